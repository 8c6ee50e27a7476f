"""One traced run: join calls and spans, store them, and pass them to the observers.

    backend (ptrace, strace, none)     ->  calls  ->
                                                     join  ->  store, observers (detectors, exporters, live lines)
    recorders behind the API -> spool  ->  spans  ->

If the store fails (a full disk), the program is traced to its end without it, and the session says so.
"""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from entrenar.errors import EntrenarError
from entrenar.trace.hot_paths import IDLE, IDLE_CALLS
from entrenar.trace.join import Join, Joined
from entrenar.trace.records import Anomaly, Mark, Metric, Process, Span, Status, SystemCall, TraceInfo
from entrenar.trace.spool import SpanEvent, Spool
from entrenar.trace.store import Writer

_HOLD_NS = 1_000_000


# Looks at what came since the last time; returns what is out of the ordinary.
Observer = Callable[[Joined], Sequence[Anomaly]]
# Returns readings of the system, if any are due.
Sampler = Callable[[], Sequence[Metric]]


@dataclass(frozen=True)
class Plan:
    """A session's settings: the command, where it stores, and its observers.

    `trace_id` and `parent` come from the launcher's TRACEPARENT, if it has one. `shortest_ns` is the duration below
    which compute spans are dropped.
    """

    command: tuple[str, ...]
    backend: str
    trace_id: int
    parent: int | None = None
    shortest_ns: int = 0
    floor_ns: int = 0


class Session:
    """Takes what the backend sees, four times a second or more often, until `finish`."""

    def __init__(
        self, plan: Plan, writer: Writer, observers: Sequence[Observer] = (), samplers: Sequence[Sampler] = ()
    ) -> None:
        self.plan = plan
        self._writer: Writer | None = writer
        self._observers, self.samplers = observers, list(samplers)
        self.folder = Path(tempfile.mkdtemp(prefix="entrenar-spans-"))
        self._spool = Spool(self.folder)
        self._join = Join()
        self.root_id = secrets.randbits(62) | 1
        self._process_ids: dict[tuple[int, int], int] = {}
        self._processes: Mapping[int, Process] = {}
        self._has_spans = False
        self.notes: list[str] = []
        self.started_ns = time.monotonic_ns()
        self._info = TraceInfo(
            plan.command, plan.trace_id, self.started_ns, time.time_ns() - time.monotonic_ns(), plan.backend,
            plan.floor_ns,
        )  # fmt: skip
        self._store(lambda store: store.add_info(self._info))

    def take(self, calls: Sequence[SystemCall], processes: Mapping[int, Process]) -> None:
        """Join and store calls."""
        self._processes = processes
        now = time.monotonic_ns()
        self._pass_on(self._join.take(self._drained(), calls, now - self.plan.shortest_ns - _HOLD_NS))

    def finish(self, exit_code: int | None, notes: Sequence[str]) -> TraceInfo:
        """Take what is left and close the store; return what the trace was about."""
        batch = self._join.take(self._drained(), (), None)
        batch.opened = self._join.open_spans()
        self._pass_on(batch)
        self.notes += notes
        self._info = replace(self._info, ended_ns=time.monotonic_ns(), exit_code=exit_code, notes=tuple(self.notes))
        self._store(lambda store: store.add_spans(self.process_spans()))
        self._store(lambda store: store.add_info(self._info))
        self._store(lambda store: store.close())
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._info

    def add_marks(self, marks: Sequence[Mark]) -> None:
        """Store instants that come from elsewhere than the program: a log, say."""
        self._store(lambda store: store.add_marks(marks))

    def living(self) -> list[int]:
        """Return the processes of the program that are not known to have ended."""
        return [process.pid for process in list(self._processes.values()) if process.ended_ns is None]

    @property
    def info(self) -> TraceInfo:
        """The trace's description so far."""
        return self._info

    def has_spans(self) -> bool:
        """Return whether the program has recorded a span."""
        return self._has_spans

    @property
    def is_stored(self) -> bool:
        """Return whether the store has taken everything so far."""
        return self._writer is not None

    def _drained(self) -> list[SpanEvent]:
        try:
            events = self._spool.drain()
        except OSError as error:
            self._note(f"spans are lost: {error}")
            return []
        self._has_spans = self._has_spans or bool(events)
        return events

    def _pass_on(self, batch: Joined) -> None:
        anomalies = [anomaly for observer in self._observers for anomaly in observer(batch)]
        metrics = [metric for sampler in self.samplers for metric in sampler()]
        self._store(lambda store: self._write(store, batch, anomalies, metrics))

    def _write(self, store: Writer, batch: Joined, anomalies: Sequence[Anomaly], metrics: Sequence[Metric]) -> None:
        for process in list(self._processes.values()):
            store.add_process(process)
        store.add_spans((*batch.opened, *batch.ended, *self.process_spans()))
        store.add_calls(batch.calls, self._idle_marked(batch))
        store.add_marks(batch.marks)
        store.add_anomalies(anomalies)
        store.add_metrics(metrics)
        store.commit()

    def _idle_marked(self, batch: Joined) -> list[str | None]:
        """Return the span names, `IDLE` where a thread other than the program's first waits for work."""
        main = next(iter(self._processes), None)
        return [
            IDLE if name is None and call.tid != main and call.name in IDLE_CALLS else name
            for call, name in zip(batch.calls, batch.span_names, strict=True)
        ]

    def _store(self, write: Callable[[Writer], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except EntrenarError as error:
            self._note(f"the trace ends here: {error}")
            self._writer = None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def process_spans(self) -> list[Span]:
        """Return one span for each process; the first is the root that TRACEPARENT names to the program."""
        spans = []
        for process in self._processes.values():
            key = (process.pid, process.started_ns)
            if key not in self._process_ids:
                self._process_ids[key] = secrets.randbits(62) | 1 if self._process_ids else self.root_id
            number = self._process_ids[key]
            is_root = number == self.root_id
            parent = self.plan.parent if is_root else self.root_id
            attributes = {"process.pid": process.pid, "process.command_line": process.command}
            if process.rank is not None:
                attributes["entrenar.rank"] = process.rank
            if process.exit_code is not None:
                attributes["process.exit.code"] = process.exit_code
            status: Status = "unset" if process.exit_code is None else "error" if process.exit_code else "ok"
            name = f"process: {program_name(self.plan.command if is_root else process.command.split(' '))}"
            spans.append(
                Span(
                    number,
                    parent,
                    name,
                    process.pid,
                    process.pid,
                    process.started_ns,
                    process.ended_ns,
                    status,
                    attributes,
                )
            )
        return spans


def program_name(words: Sequence[str]) -> str:
    """Return what a person calls a command: the script or module of an interpreter, else the program."""
    program = os.path.basename(words[0]) if words else "?"  # noqa: PTH119
    if not program.startswith("python"):
        return program
    rest = list(words[1:])
    for at, word in enumerate(rest):
        if word == "-m" and at + 1 < len(rest):
            return " ".join(rest[at + 1 : at + 3])  # python -m entrenar train
        if word == "-c":
            return f"{program} -c"
        if not word.startswith("-"):
            return os.path.basename(word)  # noqa: PTH119
    return program

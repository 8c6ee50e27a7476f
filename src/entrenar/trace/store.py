"""Write a trace into one SQLite file, while the program runs.

The file is complete at every commit: a tracer that is killed leaves all but the last second. Every call is counted in
a tally; of the calls themselves, those that were slow or failed are always kept, and the rest as long as the budget of
rows lasts, so that a program that makes calls without end leaves a file that ends.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from entrenar.errors import DiskFullError, MachineError
from entrenar.files import explained_disk_errors
from entrenar.trace.records import Anomaly, Frame, Mark, Metric, Process, Span, SystemCall, TraceInfo
from entrenar.trace.schema import TABLES, VERSION, signed
from entrenar.trace.tally import bin_of

CALL_ROWS = 300_000
SLOW_NS = 1_000_000
# Input and output: what can wait for a device or a peer. The table of hot paths calls these, and no others, slow.
IO_CALLS = frozenset(
    """
    read write pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 open openat openat2 creat close fsync
    fdatasync sync syncfs sync_file_range msync sendfile splice tee copy_file_range rename renameat renameat2 unlink
    unlinkat truncate ftruncate fallocate connect accept accept4 send sendto sendmsg sendmmsg recv recvfrom recvmsg
    recvmmsg getdents getdents64 stat lstat fstat newfstatat statx access faccessat faccessat2 mkdir mkdirat rmdir
    link linkat symlink symlinkat readlink readlinkat flock io_getevents io_uring_enter
    """.split()  # noqa: SIM905 - a list of quoted names is five times as long
)
_STATUS = {"unset": 0, "ok": 1, "error": 2}


@dataclass
class _Count:
    calls: int = 0
    errors: int = 0
    total_ns: int = 0
    max_ns: int = 0
    size_bytes: int = 0
    slow: int = 0
    histogram: dict[int, int] = field(default_factory=dict)

    def add(self, call: SystemCall) -> None:
        self.calls += 1
        self.errors += call.error is not None
        self.size_bytes += call.size_bytes or 0
        if call.duration_ns is None:
            return
        self.total_ns += call.duration_ns
        self.max_ns = max(self.max_ns, call.duration_ns)
        self.slow += call.duration_ns > SLOW_NS and call.name in IO_CALLS
        index = bin_of(call.duration_ns)
        self.histogram[index] = self.histogram.get(index, 0) + 1


class Writer:
    """A trace file that is being written. Not for use by several threads at once.

    Raises: DiskFullError, MachineError from every method that writes; committed rows stay readable.
    """

    def __init__(self, path: Path, *, call_rows: int = CALL_ROWS) -> None:
        self.path = path
        self.rows_left = call_rows
        self._strings: dict[str, int] = {}
        self._frames: dict[Frame, int] = {}
        self._stacks: dict[tuple[int, int], int] = {}
        self._whole_stacks: dict[tuple[Frame, ...], int] = {(): 0}
        self._counts: dict[tuple[int, int, int], _Count] = {}
        self._changed: set[tuple[int, int, int]] = set()
        with _explained(path), explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.executescript(f"pragma journal_mode=wal; pragma synchronous=normal; {TABLES}")
            self._db.execute("begin")
            self._set("version", str(VERSION))

    # ---- what is seen ----

    def add_info(self, info: TraceInfo) -> None:
        """Store or update the trace's description."""
        with _explained(self.path):
            self._set("info", json.dumps(asdict(info) | {"trace_id": f"{info.trace_id:032x}"}))

    def add_process(self, process: Process) -> None:
        """Store or update a process."""
        values = (
            process.pid, process.parent_pid, process.command, process.started_ns, process.ended_ns, process.exit_code,
            process.rank,
        )  # fmt: skip
        with _explained(self.path):
            self._db.execute("insert or replace into process values (?,?,?,?,?,?,?)", values)

    def add_spans(self, spans: Iterable[Span]) -> None:
        """Store spans; one that is stored already is replaced, so that it can be stored open first."""
        with _explained(self.path):
            self._db.executemany(
                "insert or replace into span values (?,?,?,?,?,?,?,?,?,?)", (self._span_row(span) for span in spans)
            )

    def add_calls(self, calls: Sequence[SystemCall], span_names: Sequence[str | None]) -> None:
        """Count calls, and keep those that the budget allows; `span_names` are the names of their spans."""
        rows = []
        with _explained(self.path):
            for call, span_name in zip(calls, span_names, strict=True):
                name, stack = self._string(call.name), self._stack(call.stack)
                key = (name, stack, self._string(span_name or ""))
                count = self._counts.get(key)
                if count is None:
                    count = self._counts[key] = _Count()
                count.add(call)
                self._changed.add(key)
                if self._is_kept(call, count):
                    rows.append(self._call_row(call, name, stack))
            self._db.executemany("insert into call values (?,?,?,?,?,?,?,?,?,?,?,?)", rows)

    def add_anomalies(self, anomalies: Iterable[Anomaly]) -> None:
        """Store what a detector found."""
        rows = (
            (a.operation, a.kind, a.at_ns, a.duration_ns, a.baseline_ns, a.sigma, a.severity, a.pid, a.tid,
             signed(a.span), *((a.frame.function, a.frame.file, a.frame.line) if a.frame else (None,) * 3), a.path)
            for a in anomalies
        )  # fmt: skip
        with _explained(self.path):
            self._db.executemany("insert into anomaly values (?,?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)

    def add_metrics(self, metrics: Iterable[Metric]) -> None:
        """Store readings of the system's metrics."""
        with _explained(self.path):
            rows = [(self._string(metric.name), metric.at_ns, metric.value) for metric in metrics]
            self._db.executemany("insert into metric values (?,?,?)", rows)

    def add_marks(self, marks: Iterable[Mark]) -> None:
        """Store instants."""
        rows = ((mark.kind, mark.text, mark.at_ns, mark.pid, mark.tid, signed(mark.span)) for mark in marks)
        with _explained(self.path):
            self._db.executemany("insert into mark values (?,?,?,?,?,?)", rows)

    def commit(self) -> None:
        """Make all that was added visible to readers and safe from a crash of the tracer."""
        with _explained(self.path):
            rows = [(*key, *self._tally_row(self._counts[key])) for key in self._changed]
            self._db.executemany("insert or replace into tally values (?,?,?,?,?,?,?,?,?,?)", rows)
            self._changed.clear()
            self._db.execute("commit")
            self._db.execute("begin")

    def close(self) -> None:
        """Commit, and fold the journal into the file, so that it can be moved alone."""
        try:
            self.commit()
            with _explained(self.path):
                self._db.execute("commit")
                self._db.execute("pragma journal_mode=delete")
        finally:
            self._db.close()

    # ---- rows ----

    def _is_kept(self, call: SystemCall, count: _Count) -> bool:
        if self.rows_left > 0:
            self.rows_left -= 1
            return True
        # A call at least as slow as any before it of its kind is worth a row however many there were.
        return call.duration_ns is None or call.duration_ns > SLOW_NS or call.duration_ns >= count.max_ns

    def _set(self, key: str, value: str) -> None:
        self._db.execute("insert or replace into meta values (?,?)", (key, value))

    def _string(self, text: str) -> int:
        number = self._strings.get(text)
        if number is None:
            number = self._strings[text] = len(self._strings)
            self._db.execute("insert into string values (?,?)", (number, text))
        return number

    def _stack(self, stack: tuple[Frame, ...]) -> int:
        number = self._whole_stacks.get(stack)
        if number is None:
            number = 0
            for frame in reversed(stack):
                number = self._stack_node(number, frame)
            self._whole_stacks[stack] = number
        return number

    def _stack_node(self, parent: int, frame: Frame) -> int:
        frame_id = self._frames.get(frame)
        if frame_id is None:
            frame_id = self._frames[frame] = len(self._frames) + 1
            generated = None if frame.generated is None else self._string(frame.generated)
            row = (frame_id, self._string(frame.function), self._string(frame.file), frame.line, generated)
            self._db.execute("insert into frame values (?,?,?,?,?)", row)
        key = (parent, frame_id)
        node = self._stacks.get(key)
        if node is None:
            node = self._stacks[key] = len(self._stacks) + 1
            self._db.execute("insert into stack values (?,?,?)", (node, parent, frame_id))
        return node

    def _span_row(self, span: Span) -> tuple[object, ...]:
        return (
            signed(span.id), signed(span.parent), self._string(span.name), span.pid,
            span.tid, span.start_ns, span.end_ns, _STATUS[span.status],
            json.dumps(dict(span.attributes), default=str) if span.attributes else None,
            json.dumps([[f"{trace:032x}", f"{other:016x}"] for trace, other in span.links]) if span.links else None,
        )  # fmt: skip

    def _call_row(self, call: SystemCall, name: int, stack: int) -> tuple[object, ...]:
        return (
            name, call.pid, call.tid, call.start_ns, call.duration_ns, call.result,
            None if call.error is None else self._string(call.error), call.size_bytes,
            None if call.path is None else self._string(call.path),
            " ".join(f"{argument:x}" for argument in call.arguments) or None, stack,
            signed(call.span),
        )  # fmt: skip

    @staticmethod
    def _tally_row(count: _Count) -> tuple[object, ...]:
        return (
            count.calls, count.errors, count.total_ns, count.max_ns, count.size_bytes, count.slow,
            json.dumps(count.histogram),
        )  # fmt: skip


class _explained:  # noqa: N801 - used as a function
    """Turn SQLite's errors into ours. A class, because a generator costs a microsecond a call here."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, sqlite3.Error):
            return
        if "full" in str(error):
            raise DiskFullError(f"no space left to write {self._path} ({error}); free space and trace again") from error
        raise MachineError(f"cannot write {self._path}: {error}") from error

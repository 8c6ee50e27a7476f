"""strace as a stand-in where the own tracer cannot run, and as its oracle: start it, and read what it writes.

It knows no Python: its calls have no lines. What it prints of buffers is switched off (`-s 0`), because a trace must
not hold what a program reads or writes.
"""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from entrenar.errors import MachineError
from entrenar.trace.ptrace.numbers import MOVES_BYTES
from entrenar.trace.records import SystemCall

OPTIONS = ("-f", "--absolute-timestamps=format:unix,precision:ns", "--syscall-times=ns", "-y", "-s", "0")
_LINE = re.compile(r"(\d+)\s+(\d+)\.(\d{9}) (.*)")
_CALL = re.compile(
    r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+|0x[0-9a-f]+|\?)"
    r"(?:<[^>]*>)?(?: (?P<error>E[A-Z0-9]+) \([^)]*\)| [^<]*)?(?: <(?P<seconds>\d+\.\d+)>)?$",
    re.DOTALL,
)
_PATH = re.compile(r'^(?:\d+|AT_FDCWD)<([^>]*)>|"((?:[^"\\]|\\.)*)"')


def command(argv: Sequence[str], output: Path, wanted: Iterable[str] | None = None) -> list[str]:
    """Return the command that runs `argv` under strace and writes to `output`.

    Raises: MachineError if there is no strace.
    """
    program = shutil.which("strace")
    if program is None:
        raise MachineError("there is no strace on this machine; install it, or choose another backend")
    chosen = ("-e", f"trace={','.join(wanted)}") if wanted is not None else ()
    return [program, *OPTIONS, *chosen, "-o", str(output), "--", *argv]


class StraceReader:
    """Turns strace's lines into calls; keeps those that have begun and not ended."""

    def __init__(self, main_pid: int = 0) -> None:
        self._unfinished: dict[int, tuple[int, str]] = {}
        self._pids: dict[int, int] = {}
        self._main = main_pid
        # strace stamps lines with the clock of the calendar, everything else here is monotonic.
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def read(self, lines: Iterable[str]) -> Iterator[SystemCall]:
        """Yield the calls that end in `lines`."""
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                continue
            tid = int(match[1])
            at_ns = int(match[2]) * 10**9 + int(match[3]) - self._offset_ns
            body = match[4].rstrip("\n").replace(" (INJECTED)", "").replace(" (DELAYED)", "")
            if body.endswith("<unfinished ...>"):
                self._unfinished[tid] = (at_ns, body.removesuffix("<unfinished ...>").rstrip())
                continue
            if body.startswith("<... ") and tid in self._unfinished:
                at_ns, head = self._unfinished.pop(tid)
                body = head + body.partition(" resumed>")[2]
            call = self._call(tid, at_ns, body)
            if call is not None:
                yield call

    def _call(self, tid: int, at_ns: int, body: str) -> SystemCall | None:
        match = _CALL.match(body)
        if match is None:
            return None  # a signal, an exit, or a call that was never seen to begin
        result = None if match["result"] == "?" else int(match["result"], 0)
        name, error = match["name"], match["error"]
        moved = result if result is not None and result >= 0 and name in MOVES_BYTES else None
        path = _PATH.search(match["arguments"])
        duration = None if match["seconds"] is None else round(float(match["seconds"]) * 1e9)
        return SystemCall(
            name, self._pid_of(tid), tid, at_ns, duration, result, error, moved,
            (path[1] or path[2]) if path else None,
        )  # fmt: skip

    def _pid_of(self, tid: int) -> int:
        if tid not in self._pids:
            self._pids[tid] = tid
            for folder in Path("/proc").glob(f"[0-9]*/task/{tid}"):
                self._pids[tid] = int(folder.parts[2])
                break
        return self._pids[tid]

"""Run a command under whatever this machine permits: the own tracer, strace, or without system calls."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from entrenar.errors import ConfigError, MachineError
from entrenar.trace import strace
from entrenar.trace.ptrace.loop import Tracer
from entrenar.trace.ptrace.numbers import architecture
from entrenar.trace.ptrace.watch import CallWatcher
from entrenar.trace.records import Process, SystemCall

BACKENDS = ("auto", "ptrace", "strace", "none")
PERMISSION = (
    "this machine does not permit tracing (ptrace); in a container start it with --cap-add=SYS_PTRACE, on a host set "
    "kernel.yama.ptrace_scope to 1 or 0"
)
_TICK_S = 0.25
_PAUSE_S = 0.01
_CALIBRATION_CALLS = 200

OnCalls = Callable[[Sequence[SystemCall], Mapping[int, Process]], None]


@dataclass(frozen=True)
class Watch:
    """Which system calls are wanted (all, if None), and whether with their stacks."""

    wanted: frozenset[str] | None = None
    with_stacks: bool = True


@dataclass(frozen=True)
class Start:
    """The program to run. If `is_time` is given, system calls are seen only once it returns true."""

    program: Path
    argv: Sequence[str]
    environment: Mapping[str, str]
    is_time: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Ended:
    """The program's exit code (negative: a signal; None: it continues without the tracer), and remarks."""

    exit_code: int | None
    notes: tuple[str, ...]


def choose(wanted: str) -> tuple[str, str | None]:
    """Return the backend to use and why it is not the first choice, if it is not.

    Raises: ConfigError for an unknown name; MachineError if one that was asked for by name cannot be used.
    """
    if wanted not in BACKENDS:
        raise ConfigError(f"the backend must be one of {', '.join(BACKENDS)}, got {wanted!r}")
    if wanted in ("none", "strace"):
        return wanted, None
    reason = "there are no tables for this processor" if architecture() is None else _forbidden()
    if reason is None:
        return "ptrace", None
    if wanted == "ptrace":
        raise MachineError(f"the ptrace backend cannot be used: {reason}")
    return "none", f"no system calls are seen: {reason}; spans are recorded all the same"


def _forbidden() -> str | None:
    """Try to trace a child that does nothing."""
    try:
        Tracer(CallWatcher(lambda _: None, with_stacks=False)).run(Path("/bin/true"), ["true"], {})
    except (OSError, MachineError) as error:
        return f"{PERMISSION} ({error})" if isinstance(error, PermissionError) else str(error)
    return None


def floor_ns() -> int:
    """Return how long a system call that does nothing takes under the own tracer."""
    calls: list[SystemCall] = []
    code = f"import os\nfor _ in range({_CALIBRATION_CALLS}): os.getppid()"
    watcher = CallWatcher(calls.extend, wanted=frozenset({"getppid"}), with_stacks=False)
    Tracer(watcher).run(Path(sys.executable), ["python", "-S", "-E", "-c", code], dict(os.environ))
    watcher.tick()
    return round(median(call.duration_ns or 0 for call in calls)) if calls else 0


def run(backend: str, start: Start, watch: Watch, on_calls: OnCalls) -> Ended:
    """Run a command to its end.

    Raises: MachineError if it cannot be executed.
    """
    if backend == "ptrace":
        run_it = Tracer.run if start.is_time is None else partial(Tracer.run_late, is_time=start.is_time)
        return _by_ptrace(lambda tracer: run_it(tracer, start.program, start.argv, start.environment), watch, on_calls)
    if backend == "strace":
        return _by_strace(start, watch, on_calls)
    return _alone(start, on_calls)


def attach(pid: int, watch: Watch, on_calls: OnCalls) -> Ended:
    """Trace a running process until it ends or a SIGINT comes.

    Raises: MachineError where that is not permitted, or for no such process.
    """
    try:
        return _by_ptrace(lambda tracer: tracer.attach(pid), watch, on_calls)
    except ProcessLookupError as error:
        raise MachineError(f"there is no process {pid}") from error
    except FileNotFoundError as error:
        raise MachineError(f"there is no process {pid}") from error
    except PermissionError as error:
        raise MachineError(
            f"cannot attach to process {pid}: {error}; another tracer may hold it (TracerPid in /proc/{pid}/status), "
            f"or {PERMISSION}"
        ) from error


def _by_ptrace(start: Callable[[Tracer], int | None], watch: Watch, on_calls: OnCalls) -> Ended:
    watcher = CallWatcher(
        lambda calls: on_calls(calls, watcher.processes), wanted=watch.wanted, with_stacks=watch.with_stacks
    )
    code = start(Tracer(watcher))
    watcher.tick()
    return Ended(code, tuple(watcher.notes))


def _alone(start: Start, on_calls: OnCalls) -> Ended:
    with _own_child(start.program, start.argv, start.environment) as child:
        process = Process(child.pid, None, " ".join(start.argv), time.monotonic_ns())
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(_TICK_S)
            on_calls((), {child.pid: process})
        on_calls((), {child.pid: replace(process, ended_ns=time.monotonic_ns(), exit_code=code)})
    return Ended(code, ())


def _by_strace(start: Start, watch: Watch, on_calls: OnCalls) -> Ended:
    with tempfile.TemporaryDirectory(prefix="entrenar-strace-") as folder:
        output = Path(folder) / "calls"
        os.mkfifo(output)
        # Without waiting for a writer: there is none if strace fails.
        descriptor = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        words = strace.command([str(start.program), *start.argv[1:]], output, watch.wanted)
        with _own_child(Path(words[0]), words, start.environment) as child:
            process = Process(child.pid, None, " ".join(start.argv), time.monotonic_ns())
            reader = strace.StraceReader()
            for lines in _batches(descriptor, child):
                calls = list(reader.read(lines))
                # The program is strace's child.
                process = replace(process, pid=calls[0].pid) if calls and process.pid == child.pid else process
                on_calls(calls, {process.pid: process})
            code = child.wait()
            on_calls((), {process.pid: replace(process, ended_ns=time.monotonic_ns(), exit_code=code)})
        os.close(descriptor)
    return Ended(code, ("strace was the tracer: calls have no lines",))


def _batches(descriptor: int, child: "subprocess.Popen[bytes]") -> Iterator[list[str]]:
    """Yield the whole lines of a pipe as they come, until the child has ended."""
    rest = b""
    is_last = False
    while not is_last:
        is_last = child.poll() is not None  # before the read: what it wrote until then is read
        select.select([descriptor], [], [], 0 if is_last else _TICK_S)
        chunk = b""
        with suppress(BlockingIOError):
            while more := os.read(descriptor, 1 << 20):
                chunk += more
        *lines, rest = (rest + chunk).split(b"\n")
        yield [line.decode("utf-8", "replace") for line in lines]
        if not chunk and not is_last:
            time.sleep(_PAUSE_S)  # nobody has opened the other end yet, or no longer


@contextmanager
def _own_child(
    program: Path, argv: Sequence[str], environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a child that keeps the terminal's signals, and pass on what a supervisor sends.

    Raises: MachineError if it cannot be executed.
    """
    try:
        child = subprocess.Popen(list(argv), executable=program, env=dict(environment))
    except OSError as error:
        raise MachineError(f"cannot run {program}: {error.strerror}; check its mode and its first line") from error
    handlers: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGQUIT: signal.SIG_IGN}
    handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), lambda number, _: child.send_signal(number))
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

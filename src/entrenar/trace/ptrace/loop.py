"""The tracer's loop: start a program or attach to one, follow its threads and children, report every system call.

PTRACE_SEIZE, so that job control and signals reach the program as without a tracer; PTRACE_O_EXITKILL and seccomp
filters are not used, because a tracer that dies must leave the program running (a filter whose tracer is gone makes
every filtered call fail with ENOSYS). A call's clock starts after its entry was looked at: reading a stack takes
longer than most calls do.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from entrenar.errors import MachineError
from entrenar.trace.ptrace import libc
from entrenar.trace.ptrace.numbers import architecture, names

_GROUP_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
# What a shell, a supervisor or a scheduler sends to the process it started, which is the tracer.
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TICK_S = 0.25
_LATE_TICK_S = 0.02
_DETACH_S = 2.0
# How long the program's own end waits for its children to end: a helper that is about to end is seen whole.
_LINGER_S = 0.2


class Watcher(Protocol):
    """Callbacks for the tracer's events. The thread is stopped during `on_entry` and `on_exit`."""

    def on_entry(self, pid: int, tid: int, number: int, arguments: tuple[int, ...]) -> Any:
        """Return what `on_exit` will want to know; None if the call is of no interest."""

    def on_exit(
        self, pid: int, tid: int, started_ns: int, duration_ns: int | None, result: int | None, seen: Any
    ) -> None:
        """Take a call that returned, or that never will (`duration_ns` None)."""

    def on_start(self, pid: int, parent: int | None) -> None:
        """Take note of a new process; the first one has no parent, and still is a copy of the tracer."""

    def on_exec(self, pid: int) -> None:
        """Take note that a process runs another program now."""

    def on_thread_end(self, tid: int) -> None:
        """Forget a thread."""

    def on_end(self, pid: int, exit_code: int) -> None:
        """Take note that a process ended; a negative code is the signal that ended it."""

    def tick(self) -> None:
        """Do what is due four times a second."""


class Tracer:
    """Traces one program and all that it starts. Everything happens in the thread that calls `run` or `attach`."""

    def __init__(self, watcher: Watcher, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._watcher = watcher
        self._clock = clock
        self._architecture = architecture()
        self._execve = next(number for number, name in names().items() if name == "execve")
        self._pids: dict[int, int] = {}
        self._entered: dict[int, tuple[int, Any]] = {}
        self._main = 0
        self._exit_code: int | None = None
        self._is_waiting = self._is_due = self._is_detaching = False
        # What the tracer's own child does before it becomes the program is not the program's.
        self._has_begun = False

    def run(self, program: Path, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a program to its end and return its exit code, negative for the signal that ended it.

        Processes that outlive the program continue without the tracer.

        Raises: OSError(EPERM) where tracing is not permitted, with nothing run; MachineError if the program cannot be
        executed.
        """
        go, failure, pid = _forked(program, argv, environment)
        try:
            libc.seize(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(go)
            os.close(failure)
            raise
        self._main = pid
        self._pids[pid] = pid
        libc.interrupt(pid)
        os.write(go, b"x")
        os.close(go)
        with _Signals(self, is_owner=True):
            self._loop()
        return self._concluded(program, failure)

    def _concluded(self, program: Path, failure: int) -> int:
        errno = os.read(failure, 16)
        os.close(failure)
        if errno:
            raise MachineError(f"cannot run {program}: {os.strerror(int(errno))}; check its mode and its first line")
        if self._exit_code is None:
            raise MachineError(f"the end of {program} was taken by another part of this process; trace alone")
        return self._exit_code

    def run_late(
        self, program: Path, argv: Sequence[str], environment: Mapping[str, str], *, is_time: Callable[[], bool]
    ) -> int:
        """Run a program like `run`, but see its calls only once `is_time` says so; until then it costs nothing.

        Children that it started before are not traced. Raises: as `run`.
        """
        go, failure, pid = _forked(program, argv, environment)
        os.write(go, b"x")
        os.close(go)
        self._main = pid
        self._watcher.on_start(pid, None)
        with _Signals(self, is_owner=True, period_s=0):
            while self._exit_code is None and not is_time():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._exit_code = os.waitstatus_to_exitcode(status)
                    self._watcher.on_end(pid, self._exit_code)
                self._watcher.tick()
                time.sleep(_LATE_TICK_S)
        if self._exit_code is None:
            self._has_begun = True
            self._watcher.on_exec(pid)
            self._seize_all(pid)
            with _Signals(self, is_owner=True):
                self._loop()
        return self._concluded(program, failure)

    def attach(self, pid: int) -> int | None:
        """Trace a running process until it ends or a SIGINT or SIGTERM comes; return its exit code, None if it goes on.

        Raises: OSError (EPERM, ESRCH).
        """
        self._main, self._has_begun = pid, True
        self._watcher.on_start(pid, None)
        self._watcher.on_exec(pid)
        self._seize_all(pid)
        with _Signals(self, is_owner=False):
            self._loop()
        return self._exit_code

    def _seize_all(self, pid: int) -> None:
        """Seize the threads of a process, and those that they start meanwhile."""
        seized: set[int] = set()
        while new := {int(name) for name in os.listdir(f"/proc/{pid}/task")} - seized:
            for tid in sorted(new, key=lambda tid: tid != pid):
                self._seize(tid, pid)
            seized |= new

    def _seize(self, tid: int, pid: int) -> None:
        try:
            libc.seize(tid)
        except OSError:
            if tid == pid:
                raise
            return  # it ended, or came to us as the child of a thread that we had
        self._pids[tid] = pid
        libc.interrupt(tid)

    def stop(self) -> None:
        """Let go of everything, and end the loop."""
        self._is_detaching = True
        for tid in self._pids:
            libc.interrupt(tid)

    def pass_on(self, number: int) -> None:
        """Send a signal that was meant for the program."""
        os.kill(self._main, number)

    def alarm(self) -> None:
        """Tick at once if the loop waits; else when it is about to wait again, so that nothing is changed under it."""
        if self._is_waiting:
            self._watcher.tick()
        else:
            self._is_due = True

    # ---- the loop ----

    def _loop(self) -> None:
        clock, waitpid = self._clock, os.waitpid
        while self._pids:
            if self._is_due:
                self._is_due = False
                self._watcher.tick()
            self._is_waiting = True
            try:
                tid, status = waitpid(-1, libc.ANY_THREAD)
            except ChildProcessError:
                return
            now = clock()
            self._is_waiting = False
            if self._take(tid, status, now):
                self._let_go_of_the_rest()
                return

    def _take(self, tid: int, status: int, now: int) -> bool:
        """Take one stop or end of a thread; return whether it was the end of the program."""
        if status & 0xFF != 0x7F:
            return self._ended(tid, status)
        if status >> 8 != libc.SYSCALL_STOP or self._is_detaching:
            self._stopped(tid, (status >> 8) & 0xFF, status >> 16)
            return False
        kind, machine, values = libc.syscall_stop(tid)
        if kind == libc.ENTRY:
            pid = self._pids.get(tid) or self._pid_of(tid)
            number = values[0] if machine == self._architecture else -1
            if number == self._execve and not self._has_begun:
                self._has_begun = True
                self._watcher.on_start(pid, None)
            seen = self._watcher.on_entry(pid, tid, number, values[1:]) if self._has_begun else None
            self._entered[tid] = (self._clock(), seen)
        elif (entry := self._entered.pop(tid, None)) is not None and entry[1] is not None:
            result = values[0] if values else None
            self._watcher.on_exit(self._pids[tid], tid, entry[0], now - entry[0], result, entry[1])
        libc.resume(tid)
        return False

    def _stopped(self, tid: int, number: int, event: int) -> None:
        if self._is_detaching:
            self._detach(tid, number, event)
        elif event == libc.EVENT_STOP:
            libc.resume(tid, libc.PTRACE_LISTEN if number in _GROUP_STOPS else libc.PTRACE_SYSCALL)
        elif event in (libc.EVENT_FORK, libc.EVENT_VFORK, libc.EVENT_CLONE):
            self._started(tid, libc.event_message(tid))
            libc.resume(tid)
        elif event == libc.EVENT_EXEC:
            self._executed(tid, libc.event_message(tid))
            libc.resume(tid)
        else:
            libc.resume(tid, signal=0 if event else number)

    def _started(self, parent: int, tid: int) -> None:
        pid = self._pid_of(tid)
        if pid == tid:
            self._watcher.on_start(pid, self._pids.get(parent, parent))

    def _executed(self, pid: int, former: int) -> None:
        """Continue with the thread that called exec: it has the id of its process now, and all others are gone."""
        if former != pid:
            if (entry := self._entered.pop(former, None)) is not None:
                self._entered[pid] = entry
            self._pids.pop(former, None)
        self._pids[pid] = pid
        self._watcher.on_exec(pid)

    def _ended(self, tid: int, status: int) -> bool:
        """Take the end of a thread; return whether it was the program's own."""
        pid = self._pids.pop(tid, tid)
        started, seen = self._entered.pop(tid, (0, None))
        if seen is not None:
            self._watcher.on_exit(pid, tid, started, None, None, seen)
        self._watcher.on_thread_end(tid)
        if tid != pid:
            return False
        code = os.waitstatus_to_exitcode(status)
        self._watcher.on_end(pid, code)
        if pid == self._main:
            self._exit_code = code
        return pid == self._main

    def _pid_of(self, tid: int) -> int:
        pid = tid
        try:
            with open(f"/proc/{tid}/status") as status:
                pid = next(int(line[5:]) for line in status if line.startswith("Tgid:"))
        except (OSError, StopIteration):
            pass  # it is gone already
        self._pids[tid] = pid
        return pid

    # ---- letting go ----

    def _detach(self, tid: int, number: int, event: int) -> None:
        is_signal = not event and number != libc.SYSCALL_STOP
        libc.resume(tid, libc.PTRACE_DETACH, number if is_signal else 0)
        self._pids.pop(tid, None)
        self._entered.pop(tid, None)

    def _let_go_of_the_rest(self) -> None:
        """Detach from what outlives the program, so that it does not stay in a stop."""
        self._follow(_LINGER_S)
        self.stop()
        self._follow(_DETACH_S)

    def _follow(self, seconds: float) -> None:
        """Go on for a while, at most until everything has ended."""
        deadline = time.monotonic() + seconds
        while self._pids and time.monotonic() < deadline:
            try:
                tid, status = os.waitpid(-1, libc.ANY_THREAD | os.WNOHANG)
            except ChildProcessError:
                return
            if tid == 0:
                time.sleep(0.001)
            else:
                self._take(tid, status, self._clock())


class _Signals:
    """Keep the terminal's signals for the program, pass on what a supervisor sends, and tick by a timer."""

    def __init__(self, tracer: Tracer, *, is_owner: bool, period_s: float = _TICK_S) -> None:
        self._period_s = period_s
        self._handlers: dict[int, Any] = {signal.SIGALRM: lambda *_: tracer.alarm()}
        if is_owner:
            # The terminal sends these to the program as well; only the program decides what they mean.
            self._handlers |= {signal.SIGINT: signal.SIG_IGN, signal.SIGQUIT: signal.SIG_IGN}
            self._handlers |= dict.fromkeys(_PASSED_ON, lambda number, _: tracer.pass_on(number))
        else:
            self._handlers |= dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: tracer.stop())

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, handler) for number, handler in self._handlers.items()}
        signal.setitimer(signal.ITIMER_REAL, self._period_s, self._period_s)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _forked(program: Path, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Fork a child that becomes the program when it gets a byte; return the pipe to it, the pipe of errors, its pid."""
    wait, go = os.pipe()
    failure, fail = os.pipe()
    pid = os.fork()
    if pid:
        os.close(wait)
        os.close(fail)
        return go, failure, pid
    os.close(go)
    return _become(program, argv, environment, wait, fail)


def _become(program: Path, argv: Sequence[str], environment: Mapping[str, str], wait: int, fail: int) -> NoReturn:
    try:
        # Python ignores these two; the program must find them as it would under a shell.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if os.read(wait, 1):
            os.execve(program, list(argv), dict(environment))
    except OSError as error:
        os.write(fail, str(error.errno).encode())
    finally:
        os._exit(127)

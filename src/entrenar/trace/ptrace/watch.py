"""Turn what the tracer's loop sees into records: name, file, bytes, error, and the Python stack of each call."""

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from entrenar.trace.ptrace import numbers
from entrenar.trace.ptrace.python_layout import UnknownPython
from entrenar.trace.ptrace.python_stack import PythonStack
from entrenar.trace.records import Frame, Process, SystemCall

_FLUSH_CALLS = 2000
_PATH_BYTES = 512
_MAX_ERRNO = 4095
# AT_FDCWD and the like come as unsigned 64-bit numbers.
_MAX_DESCRIPTOR = 1 << 20


class _Image:
    """The program that a process runs: its memory, and its Python if it has one."""

    __slots__ = ("calls", "is_python", "next_look", "stack")

    def __init__(self, stack: PythonStack | None, *, is_python: bool) -> None:
        self.stack, self.is_python = stack, is_python
        self.calls, self.next_look = 0, 1


class CallWatcher:
    """Collects system calls and hands them on in batches, in the order in which they returned."""

    def __init__(
        self,
        on_calls: Callable[[Sequence[SystemCall]], None],
        *,
        wanted: frozenset[str] | None = None,
        with_stacks: bool = True,
    ) -> None:
        """Watch the calls in `wanted`, all if it is None; `on_calls` gets them at least four times a second."""
        self._on_calls = on_calls
        self._with_stacks = with_stacks
        table = numbers.names()
        self._names = {number: name for number, name in table.items() if wanted is None or name in wanted}
        self._wants_unknown = wanted is None
        self._by_descriptor = {number for number, name in table.items() if name in numbers.BY_DESCRIPTOR}
        self._by_path = {number: numbers.BY_PATH[name] for number, name in table.items() if name in numbers.BY_PATH}
        self._images: dict[int, _Image] = {}
        self._calls: list[SystemCall] = []
        self.processes: dict[int, Process] = {}
        self.notes: list[str] = []

    # ---- what the loop calls ----

    def on_entry(self, pid: int, tid: int, number: int, arguments: tuple[int, ...]) -> Any:
        """Return name, arguments, path and stack of a call; None if it is not wanted."""
        name = self._names.get(number)
        if name is None:
            if not self._wants_unknown:
                return None
            name = f"syscall_{number}"
        return name, arguments, self._path(tid, number, arguments), self._stack(pid, tid)

    def on_exit(
        self, pid: int, tid: int, started_ns: int, duration_ns: int | None, result: int | None, seen: Any
    ) -> None:
        """Add a call."""
        name, arguments, path, stack = seen
        error = None
        if result is not None and -_MAX_ERRNO <= result < 0:
            error = errno.errorcode.get(-result, f"E{-result}")
        size = result if result is not None and result >= 0 and name in numbers.MOVES_BYTES else None
        self._calls.append(
            SystemCall(name, pid, tid, started_ns, duration_ns, result, error, size, path, arguments, stack)
        )
        if len(self._calls) >= _FLUSH_CALLS:
            self.tick()

    def on_start(self, pid: int, parent: int | None) -> None:
        """Note a new process; it shares its parent's Python until it runs another program."""
        self.processes[pid] = Process(pid, parent, _command(pid), time.monotonic_ns())
        if parent is None:
            self._images[pid] = _Image(None, is_python=False)
            return
        image = self._images.get(parent)
        stack = image.stack if image is not None and image.is_python else None
        self._images[pid] = _Image(self._opened(pid, like=stack), is_python=stack is not None)

    def on_exec(self, pid: int) -> None:
        """Forget the program that a process ran."""
        self._close(pid)
        if pid in self.processes:
            self.processes[pid] = replace(self.processes[pid], command=_command(pid), rank=_rank(pid))

    def on_thread_end(self, tid: int) -> None:
        """Forget a thread."""
        for image in self._images.values():
            if image.stack is not None:
                image.stack.forget(tid)

    def on_end(self, pid: int, exit_code: int) -> None:
        """Note the end of a process."""
        self._close(pid)
        if pid in self.processes:
            self.processes[pid] = replace(self.processes[pid], ended_ns=time.monotonic_ns(), exit_code=exit_code)

    def tick(self) -> None:
        """Hand on the calls so far."""
        calls, self._calls = self._calls, []
        self._on_calls(calls)

    # ---- a call's stack and file ----

    def _stack(self, pid: int, tid: int) -> tuple[Frame, ...]:
        if not self._with_stacks:
            return ()
        image = self._images.get(pid)
        if image is None:
            image = self._images[pid] = _Image(self._opened(pid), is_python=False)
        if not image.is_python:
            image.calls += 1
            if image.calls >= image.next_look:
                self._look_for_python(pid, image)
        return image.stack.stack(tid) if image.is_python and image.stack is not None else ()

    def _look_for_python(self, pid: int, image: _Image) -> None:
        """Look for Python, less and less often: it is there within the first calls, or when a program embeds it."""
        image.next_look = image.calls * 2
        if image.stack is None:
            return
        try:
            image.is_python = image.stack.find()
        except UnknownPython as error:
            self.note(f"{_command(pid).split(' ')[0]}: no lines for its calls: {error}")
            image.stack.close()
            image.stack = None
        except (OSError, ValueError):
            pass  # it is changing under the look; the next one will see

    def note(self, text: str) -> None:
        """Keep a remark for the reader of the trace, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _opened(self, pid: int, *, like: PythonStack | None = None) -> PythonStack | None:
        try:
            return PythonStack(pid, like=like) if self._with_stacks else None
        except OSError:
            return None

    def _close(self, pid: int) -> None:
        image = self._images.pop(pid, None)
        if image is not None and image.stack is not None:
            image.stack.close()

    def _path(self, tid: int, number: int, arguments: tuple[int, ...]) -> str | None:
        if number in self._by_descriptor:
            if arguments[0] > _MAX_DESCRIPTOR:
                return None
            try:
                return os.readlink(f"/proc/{tid}/fd/{arguments[0]}")
            except OSError:
                return None
        at = self._by_path.get(number)
        return None if at is None else _text_at(tid, arguments[at])


def _text_at(tid: int, address: int) -> str | None:
    """Read a zero-terminated text out of a stopped thread's memory."""
    try:
        memory = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(memory, _PATH_BYTES, address)
        finally:
            os.close(memory)
    except (OSError, OverflowError):
        return None
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()


def _rank(pid: int) -> int | None:
    """Return the rank that torchrun gave to a process."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            found = re.search(rb"(?:^|\0)RANK=(\d+)(?:\0|$)", stream.read())
    except OSError:
        return None
    return int(found[1]) if found else None


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""

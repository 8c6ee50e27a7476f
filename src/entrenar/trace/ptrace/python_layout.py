"""Where CPython keeps what a stack consists of, by version, and where a running process keeps its interpreter.

3.11 and 3.12: `offsetof` in each version's internal headers; the same in all their patch releases. 3.13 and later
describe themselves: `_PyRuntime` begins with `_Py_DebugOffsets` (cpython/Include/internal/pycore_runtime.h).
A version that is not known is refused, because a wrong offset would give wrong lines.
"""

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from entrenar.trace.ptrace.elf import ElfFile, symbols

_WORD = struct.Struct("<Q").unpack_from
_SYMBOLS = ("_PyRuntime", "Py_Version")
_MAPPING = re.compile(r"([0-9a-f]+)-[0-9a-f]+ \S+ ([0-9a-f]+) \S+ \d+ +(/.*)")
_IS_CPYTHON = re.compile(r"/(?:lib)?python3(?:\.\d+)?(?:\.so[.\d]*)?$")

Memory = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes. `cframe` is None where the thread state points to the frame itself."""

    version: tuple[int, int]
    threads_head: int
    thread_next: int
    thread_native_id: int
    cframe: int | None
    current_frame: int
    frame_code: int
    frame_instruction: int
    frame_previous: int
    frame_owner: int
    code_file: int
    code_qualified_name: int
    code_line_table: int
    code_first_line: int
    code_body: int
    ascii_data: int
    compact_data: int


_KNOWN = {
    (3, 11): Layout((3, 11), 16, 8, 160, 56, 8, 32, 56, 48, 69, 112, 128, 136, 72, 184, 48, 72),
    (3, 12): Layout((3, 12), 72, 8, 144, 56, 0, 0, 56, 8, 70, 112, 128, 136, 68, 192, 40, 56),
}
_INTERPRETER_MAIN = 48  # _PyRuntimeState.interpreters.main, 3.11 and 3.12


class UnknownPython(Exception):
    """A Python whose stacks cannot be read: says which one."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """Address of the main interpreter's state in a process, and how to read it."""

    address: int
    layout: Layout


def find_interpreter(pid: int, memory: Memory) -> Interpreter | None:
    """Return the interpreter of a process; None if it runs none, or one that has not begun.

    Raises: UnknownPython.
    """
    found = _runtime(pid)
    if found is None:
        return None
    runtime, version_at = found
    version = _WORD(memory(version_at, 8))[0]
    number = (version >> 24 & 0xFF, version >> 16 & 0xFF)
    if number in _KNOWN:
        layout, at = _KNOWN[number], runtime + _INTERPRETER_MAIN
    elif number >= (3, 13):
        layout, at = _described(number, memory(runtime, 640), runtime)
    else:
        raise UnknownPython(f"Python {number[0]}.{number[1]}: lines are read from 3.11 on")
    address = _WORD(memory(at, 8))[0]
    return Interpreter(address, layout) if address else None


def _runtime(pid: int) -> tuple[int, int] | None:
    """Return where a process has `_PyRuntime` and `Py_Version`."""
    seen: set[str] = set()
    with open(f"/proc/{pid}/maps") as maps:
        lines = maps.readlines()
    executable = os.readlink(f"/proc/{pid}/exe")
    for line in lines:
        match = _MAPPING.match(line)
        if match is None or match[3] in seen:
            continue
        seen.add(match[3])
        if match[3] != executable and not _IS_CPYTHON.search(match[3]):
            continue
        try:
            is_relative, found = symbols(ElfFile.at(f"/proc/{pid}/root{match[3]}"), _SYMBOLS)
        except OSError:
            continue  # replaced or deleted since it was loaded
        if len(found) == len(_SYMBOLS):
            start = int(match[1], 16) if is_relative else 0
            return start + found["_PyRuntime"], start + found["Py_Version"]
    return None


def _described(number: tuple[int, int], head: bytes, runtime: int) -> tuple[Layout, int]:
    """Read `_Py_DebugOffsets` of 3.13; later versions put other fields before those needed, so they are refused."""
    if head[:8] != b"xdebugpy" or number != (3, 13):
        raise UnknownPython(f"Python {number[0]}.{number[1]}: this entrenar reads lines of 3.11 to 3.13")
    if _WORD(head, 16)[0]:
        raise UnknownPython("Python 3.13 without its lock (free-threaded): lines are not read from it")
    words = struct.unpack_from("<72Q", head, 0)
    runtime_state, interpreter, thread, frame, code = words[3:6], words[6:19], words[19:28], words[28:34], words[34:44]
    ascii_data = 40  # sizeof(PyASCIIObject)
    layout = Layout(
        number, interpreter[3], thread[2], thread[6], None, thread[4], frame[2], frame[3], frame[1], frame[5], code[1],
        code[3], code[4], code[5], code[9], ascii_data, ascii_data + 16,
    )  # fmt: skip
    return layout, runtime + runtime_state[2]

"""Read the Python stack of a stopped thread out of its process's memory.

interpreter -> the thread's state (by its native id) -> its innermost frame -> the frames around it; each frame names
its code object and the instruction it is at, and the code object's line table (PEP 657) turns that into a line.
Code objects are remembered by address, but an address is used again when a module's code is freed after its import,
so that what identifies one is compared at every use.
"""

import os
import struct

from entrenar.trace.ptrace.python_layout import Interpreter, find_interpreter
from entrenar.trace.records import Frame

_WORD = struct.Struct("<Q").unpack_from
_INT = struct.Struct("<i").unpack_from
_MAX_DEPTH = 64
_MAX_STRING = 4096
_MAX_TABLE = 1 << 20
_OWNED_BY_C_STACK = 3
_CODE_BYTES = 208
_IMPORT_SYSTEM = "<frozen importlib"
_BYTES_DATA = 32  # offset of the bytes in a bytes object


class _Code:
    """A code object that was read once."""

    __slots__ = ("file", "frames", "identity", "lines", "name", "starts_at")

    def __init__(self, identity: bytes, name: str, file: str, lines: list[int], starts_at: int) -> None:
        self.identity, self.name, self.file, self.lines, self.starts_at = identity, name, file, lines, starts_at
        self.frames: dict[int, Frame] = {}

    def frame(self, instruction: int) -> Frame:
        found = self.frames.get(instruction)
        if found is None:
            at = (instruction - self.starts_at) >> 1
            line = self.lines[at] if 0 <= at < len(self.lines) else 0
            found = self.frames[instruction] = Frame(self.name, self.file, line)
        return found


class PythonStack:
    """Stacks of the threads of one process while it runs one program."""

    def __init__(self, pid: int, *, like: "PythonStack | None" = None) -> None:
        """Open the memory of `pid`; `like` is its parent before the fork, with the same interpreter.

        Raises: OSError.
        """
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._pid = pid
        self._interpreter: Interpreter | None = like._interpreter if like else None
        self._codes: dict[int, _Code] = dict(like._codes) if like else {}
        self._threads: dict[int, int] = {}

    def close(self) -> None:
        """Close the memory."""
        os.close(self._memory)

    def find(self) -> bool:
        """Look for the interpreter; return whether there is one.

        Raises: UnknownPython, OSError.
        """
        if self._interpreter is None:
            self._interpreter = find_interpreter(self._pid, self._read)
        return self._interpreter is not None

    def forget(self, tid: int) -> None:
        """Forget a thread that ended: its id may come again."""
        self._threads.pop(tid, None)

    def stack(self, tid: int) -> tuple[Frame, ...]:
        """Return the frames of a stopped thread, innermost first; empty for one that runs no Python.

        During an import only the innermost function of the import system and the module that imports are returned:
        there are tens of frames between them, and tens of thousands of calls.
        """
        if self._interpreter is None:
            return ()
        try:
            return self._frames(self._interpreter, tid)
        except (OSError, struct.error, IndexError, UnicodeDecodeError):
            return ()  # the thread is being made or unmade

    def _frames(self, interpreter: Interpreter, tid: int) -> tuple[Frame, ...]:
        layout, read = interpreter.layout, self._read
        state = self._state(interpreter, tid)
        if not state:
            return ()
        block = state[1]
        if layout.cframe is None:
            at = _WORD(block, layout.current_frame)[0]
        else:
            at = _WORD(read(_WORD(block, layout.cframe)[0] + layout.current_frame, 8))[0]
        frames: list[Frame] = []
        is_import = False
        while at and len(frames) < _MAX_DEPTH:
            raw = read(at, 72)
            if raw[layout.frame_owner] != _OWNED_BY_C_STACK:
                code = self._code(interpreter, _WORD(raw, layout.frame_code)[0])
                is_inside = code.file.startswith(_IMPORT_SYSTEM)
                if not (is_import and is_inside):
                    frames.append(code.frame(_WORD(raw, layout.frame_instruction)[0]))
                if is_import and not is_inside:
                    break
                is_import = is_inside and (is_import or len(frames) == 1)
            at = _WORD(raw, layout.frame_previous)[0]
        return tuple(frames)

    def _state(self, interpreter: Interpreter, tid: int) -> tuple[int, bytes] | None:
        layout = interpreter.layout
        size = layout.thread_native_id + 8
        at = self._threads.get(tid)
        if at is not None:
            block = self._read(at, size)
            if _WORD(block, layout.thread_native_id)[0] == tid:
                return at, block
        at = _WORD(self._read(interpreter.address + layout.threads_head, 8))[0]
        while at:
            block = self._read(at, size)
            if _WORD(block, layout.thread_native_id)[0] == tid:
                self._threads[tid] = at
                return at, block
            at = _WORD(block, layout.thread_next)[0]
        return None

    def _code(self, interpreter: Interpreter, address: int) -> _Code:
        layout = interpreter.layout
        raw = self._read(address, _CODE_BYTES)
        identity = raw[16:24] + raw[layout.code_first_line : layout.code_line_table + 8]
        code = self._codes.get(address)
        if code is not None and code.identity == identity and code.name != "<module>":
            return code
        table_at = _WORD(raw, layout.code_line_table)[0]
        table_bytes = min(_WORD(self._read(table_at + 16, 8))[0], _MAX_TABLE)
        file = self._text(_WORD(raw, layout.code_file)[0], layout.ascii_data, layout.compact_data)
        # The code of a module is freed after its import, and the next module's may take all its addresses.
        if code is not None and code.identity == identity and code.file == file:
            return code
        name = self._text(_WORD(raw, layout.code_qualified_name)[0], layout.ascii_data, layout.compact_data)
        lines = line_table(self._read(table_at + _BYTES_DATA, table_bytes), _INT(raw, layout.code_first_line)[0])
        code = self._codes[address] = _Code(identity, name, file, lines, address + layout.code_body)
        return code

    def _text(self, address: int, ascii_data: int, compact_data: int) -> str:
        head = self._read(address, 40)
        length = min(_WORD(head, 16)[0], _MAX_STRING)
        state = head[32]
        kind, is_ascii = state >> 2 & 7, state >> 6 & 1
        raw = self._read(address + (ascii_data if is_ascii else compact_data), length * max(kind, 1))
        return raw.decode({2: "utf-16-le", 4: "utf-32-le"}.get(kind, "latin-1"))

    def _read(self, address: int, size: int) -> bytes:
        return os.pread(self._memory, size, address)


def line_table(table: bytes, line: int) -> list[int]:
    """Return the line of each instruction (two bytes) of a location table; 0 where there is none.

    The format is cpython/Objects/locations.md: a kind, a length, and a difference in lines for each entry.
    """
    lines: list[int] = []
    at = 0
    while at < len(table):
        head = table[at]
        at += 1
        kind = head >> 3 & 15
        if kind in (13, 14):
            difference, at = _signed_varint(table, at)
            line += difference
            at = _after_long_form(table, at) if kind == 14 else at
        elif 10 <= kind <= 12:
            line += kind - 10
            at += 2
        elif kind < 10:
            at += 1
        lines += [0 if kind == 15 else line] * ((head & 7) + 1)
    return lines


def _after_long_form(table: bytes, at: int) -> int:
    """Step over the end line and the two columns of an entry of the long form."""
    for _ in range(3):
        _, at = _varint(table, at)
    return at


def _varint(table: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = table[at]
        at += 1
        value |= (byte & 63) << shift
        shift += 6
        if not byte & 64:
            return value, at


def _signed_varint(table: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(table, at)
    return (-(value >> 1) if value & 1 else value >> 1), at

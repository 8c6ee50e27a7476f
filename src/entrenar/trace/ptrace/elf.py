"""Find symbols of an ELF file: just enough to learn where a CPython keeps its runtime."""

import os
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Self

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNSYM, _SYMTAB, _LOAD, _SHARED = 11, 2, 1, 3


@dataclass(frozen=True, slots=True)
class ElfFile:
    """A file identified by device and inode, not by its path."""

    device: int
    inode: int
    modified_ns: int
    path: str = field(compare=False)

    @classmethod
    def at(cls, path: str) -> Self:
        """Return the file at `path`.

        Raises: OSError.
        """
        status = os.stat(path)
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns, path)


@cache
def symbols(file: ElfFile, wanted: tuple[str, ...]) -> tuple[bool, dict[str, int]]:
    """Return whether a 64-bit ELF file is loaded anywhere, and the address of each wanted symbol it has.

    The addresses of a file that is loaded anywhere are relative to where that is. Another file has no symbols.
    """
    with open(file.path, "rb") as stream:
        data = stream.read()
    if data[:5] != b"\x7fELF\x02":
        return False, {}
    (kind,) = struct.unpack_from("<H", data, 16)
    program_at, section_at = struct.unpack_from("<QQ", data, 32)
    _, _, program_count, _, section_count, _ = struct.unpack_from("<HHHHHH", data, 52)
    segments = [_SEGMENT.unpack_from(data, program_at + index * 56) for index in range(program_count)]
    base = min((segment[3] for segment in segments if segment[0] == _LOAD), default=0) if kind == _SHARED else 0
    found: dict[str, int] = {}
    for index in range(section_count):
        section = _SECTION.unpack_from(data, section_at + index * 64)
        if section[1] in (_DYNSYM, _SYMTAB) and len(found) < len(wanted):
            strings = _SECTION.unpack_from(data, section_at + section[6] * 64)
            found |= {name: address - base for name, address in _in_table(data, section, strings, wanted)}
    return kind == _SHARED, found


def _in_table(
    data: bytes, section: tuple[int, ...], strings: tuple[int, ...], wanted: tuple[str, ...]
) -> list[tuple[str, int]]:
    text = data[strings[4] : strings[4] + strings[5]]
    offsets = {text.find(b"\0" + name.encode() + b"\0") + 1: name for name in wanted}
    table = data[section[4] : section[4] + section[5]]
    # 1. is the empty name, which every table begins with
    return [
        (offsets[symbol[0]], symbol[4])
        for symbol in _SYMBOL.iter_unpack(table)
        if symbol[0] and symbol[0] in offsets and symbol[4]
    ]

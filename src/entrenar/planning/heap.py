"""The room that the allocator needs beside what is asked of it, found out by asking it.

glibc's heap has holes: a block is freed, something small is put in its place, and the next block of the same size goes
elsewhere. In a training step this is 10 to 30 % of the tensors' bytes, and it depends on the order of all requests,
small ones too. So the order is not modelled but gone through: each tensor without bytes takes a block of its size from
the real heap, which is never touched and so costs no memory, among the small objects that a step makes anyway. What
all blocks covered together, at one time or another, is what a run would have written to and so would hold, as long as
the allocator is told to keep what is freed. Where it is told to return large blocks, each is a mapping of whole pages
that is gone when it is freed, and only the small ones are gone through (`train.allocator`).
"""

import ctypes
import mmap
import os
import platform

_ALIGNMENT = 64  # torch's own, c10/core/alignment.h
_PAGE = 4096
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
# Blocks beyond this share of the machine's memory are not taken: a run of them does not fit. And a small object at the
# end of the heap keeps it from shrinking, while a process with a heap larger than memory cannot fork.
_MOST_OF_MEMORY = 0.7
# What is noted lies in pages of its own, or it would take the holes that are to be found. Unused ones cost nothing.
_CAPACITY = 1 << 22


class Heap:
    """Blocks of glibc's main heap that are taken and never touched.

    Attributes:
        is_there: whether this is glibc and there was room for every block so far; nothing else can be asked.
        returned_from: blocks of this size or more are returned when they are freed; None where all are kept.
    """

    def __init__(self, returned_from: int | None = None) -> None:
        self.returned_from = returned_from
        self._mapped = self._most_mapped = self._taken = 0
        self._room = _MOST_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.is_there = platform.libc_ver()[0] == "glibc"
        self._starts, self._ends = (memoryview(mmap.mmap(-1, 8 * _CAPACITY)).cast("Q") for _ in range(2))
        self._count = 0
        if not self.is_there:
            return
        libc = ctypes.CDLL(None)
        self._free, self._take = libc.free, libc.posix_memalign
        self._free.argtypes = [ctypes.c_void_p]
        self._take.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._ask_resident = libc.mincore
        self._ask_resident.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._address = ctypes.c_void_p()
        self._place = ctypes.byref(self._address)

    @property
    def covered_bytes(self) -> int:
        """The most that was held, in whole pages: what kept blocks ever covered, and returned ones at their most."""
        return self._most_mapped + sum(end - start for start, end in self._covered())

    @property
    def own_bytes(self) -> int:
        """What the notes take."""
        return 16 * self._count

    @property
    def resident_bytes(self) -> int:
        """What of the covered pages is in memory although no block was touched.

        There are the notes of the allocator itself, what lay in a place before or after a block, and what was there
        and free from the start.
        """
        resident = 0
        for start, end in self._covered():
            pages = (ctypes.c_ubyte * ((end - start) // _PAGE))()
            if self._ask_resident(start, end - start, pages) == 0:
                resident += bytes(pages).translate(_LOWEST_BIT).count(1)
        return resident * _PAGE

    def _covered(self) -> list[tuple[int, int]]:
        """Return the ranges of pages that kept blocks ever covered."""
        ranges: list[tuple[int, int]] = []
        for start, end in sorted(zip(self._starts[: self._count], self._ends[: self._count], strict=True)):
            first, last = start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(ranges[-1][1], last)
            else:
                ranges.append((first, last))
        return ranges

    def take(self, size_bytes: int) -> int:
        """Take a block and return its address; 0 for one that is only counted, or not to be had."""
        if not self.is_there or size_bytes == 0:
            return 0
        if self._is_mapping(size_bytes):
            self._mapped += _pages(size_bytes)
            self._most_mapped = max(self._most_mapped, self._mapped)
            return 0
        is_full = self._count == _CAPACITY or self._taken + size_bytes > self._room
        if is_full or self._take(self._place, _ALIGNMENT, size_bytes) != 0:
            self.is_there = False
            return 0
        self._taken += size_bytes
        address = int(self._address.value or 0)
        self._starts[self._count], self._ends[self._count] = address, address + size_bytes
        self._count += 1
        return address

    def give_back(self, address: int, size_bytes: int) -> None:
        """Free a block that was taken."""
        if address:
            self._free(address)
            self._taken -= size_bytes
        elif self.is_there and self._is_mapping(size_bytes):
            self._mapped -= _pages(size_bytes)

    def _is_mapping(self, size_bytes: int) -> bool:
        return self.returned_from is not None and size_bytes >= self.returned_from


def _pages(size_bytes: int) -> int:
    return -(-(size_bytes + _ALIGNMENT) // _PAGE) * _PAGE

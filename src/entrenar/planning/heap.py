"""Allocator overhead, measured by replaying the requests of a step on the real heap.

glibc's heap has holes: a block is freed, something small takes its place, and the next block of the same size goes
elsewhere. In a training step this is 10 to 30 % of the tensors' bytes, and it depends on the order of all requests,
small ones too. So the order is replayed, not modelled: each tensor without bytes takes a block of its size from the
real heap, among the small objects that a step makes anyway. The block is never touched and so costs no memory. A run
would have written to everything that the blocks ever covered, and would hold it as long as the allocator keeps freed
memory. Where the allocator returns large blocks, each is a mapping of whole pages that is gone when it is freed, and
only the small blocks are replayed (`train.allocator`).
"""

import ctypes
import mmap
import os
import platform

_ALIGNMENT = 64  # torch's own, c10/core/alignment.h
_PAGE = 4096
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
# Blocks beyond this share of the machine's memory are not taken: such a run does not fit. Besides, a small object at
# the end of the heap keeps it from shrinking, and a process with a heap larger than memory cannot fork.
_MOST_OF_MEMORY = 0.7
# Notes lie in pages of their own, or they would fill the holes that we look for. Unused pages cost nothing.
_CAPACITY = 1 << 22


class Heap:
    """Blocks of glibc's main heap that are taken and never touched.

    Attributes:
        is_there: whether this is glibc and every block so far fitted; if not, nothing else can be asked.
        returned_from: blocks of this size or more are returned when freed; None if all are kept.
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
        """The most that was held, in whole pages: all that kept blocks ever covered, and the peak of returned ones."""
        return self._most_mapped + sum(end - start for start, end in self._covered())

    @property
    def own_bytes(self) -> int:
        """The memory of the notes themselves."""
        return 16 * self._count

    @property
    def resident_bytes(self) -> int:
        """The covered pages that are in memory although no block was touched.

        They hold the allocator's own notes, whatever lay in a place before or after a block, and memory that was free
        from the start.
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
        """Take a block and return its address; 0 for a block that is only counted or cannot be had."""
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

"""Keep freed memory for the next step, or give it back to the kernel at once: time against memory.

glibc serves a block of 32 MiB or more with its own mapping and unmaps it at `free`, so each step would take thousands
of page faults to get the same activations and gradients back, zeroed by the kernel each time. With mappings off and
the heap never trimmed, the second step runs in the memory of the first. The cost is that the process's memory does not
shrink, and that it grows beyond what is in use: torch asks for aligned blocks, and a freed block of the same size is
too small for an aligned one, so that holes stay empty until their neighbors are free too.

Where memory is short, every large block gets a mapping of its own instead, and is unmapped when it is freed. Then the
peak is what is in use, and the kernel zeroes each block again. See mallopt(3).
"""

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
RETURNED_FROM = 1 << 17
_MOST_MAPPINGS = 1 << 16
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory; return whether it accepted (other allocators are left alone)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def return_freed_blocks() -> bool:
    """Make glibc's allocator return large blocks when they are freed; return whether it accepted."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, _MOST_MAPPINGS)) and bool(libc.mallopt(_M_MMAP_THRESHOLD, RETURNED_FROM))

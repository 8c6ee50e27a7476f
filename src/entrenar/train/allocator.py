"""Keep freed memory for the next step instead of giving it back to the kernel.

glibc serves a block of 32 MiB or more with its own mapping and unmaps it at `free`, so each step would take thousands
of page faults to get the same activations and gradients back, zeroed by the kernel each time. With mappings off and
the heap never trimmed, the second step runs in the memory of the first. The cost is that the process's memory does not
shrink. See mallopt(3).
"""

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed; return whether it was told (elsewhere nothing is done)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))

"""System calls by number, for the machine's own architecture. The tables come from the kernel's headers (6.1)."""

import platform
from functools import cache
from importlib.resources import files

# AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Calls that move bytes between memory and the file of the descriptor that is their first argument.
_TRANSFERS = frozenset([
    "read", "write", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2", "pwritev2", "sendto",
    "recvfrom", "sendmsg", "recvmsg", "sendfile",
])  # fmt: skip
# Calls whose first argument is a descriptor of the file they are about.
BY_DESCRIPTOR = _TRANSFERS | frozenset([
    "close", "fsync", "fdatasync", "sync_file_range", "ftruncate", "fallocate", "lseek", "fstat", "getdents64",
    "flock", "ioctl",
])  # fmt: skip
# Calls that name their file: which argument points to the path.
BY_PATH = {
    "open": 0, "creat": 0, "stat": 0, "lstat": 0, "access": 0, "mkdir": 0, "rmdir": 0, "unlink": 0, "rename": 0,
    "truncate": 0, "readlink": 0, "execve": 0, "chdir": 0, "statfs": 0,
    "openat": 1, "openat2": 1, "newfstatat": 1, "statx": 1, "faccessat": 1, "faccessat2": 1, "mkdirat": 1,
    "unlinkat": 1, "renameat": 1, "renameat2": 1, "readlinkat": 1,
}  # fmt: skip
# Calls whose result is a number of bytes moved.
MOVES_BYTES = _TRANSFERS | frozenset(["copy_file_range", "splice", "tee", "getrandom"])


def architecture() -> int | None:
    """Return the kernel's number of this machine's architecture, None if there is no table for it."""
    return _ARCHITECTURES.get(platform.machine())


@cache
def names() -> dict[int, str]:
    """Return the name of each system call of this machine."""
    table = files(__package__).joinpath(f"{platform.machine()}.txt").read_text("ascii")
    return {int(number): name for number, name in (line.split() for line in table.splitlines())}

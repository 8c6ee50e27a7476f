"""The limits that the kernel enforces for us, without privileges."""

import ctypes
import os
import resource
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from entrenar.memory import status_bytes
from entrenar.quality.chaos.config import ChaosConfig

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14


def limit_memory(pid: int, added_bytes: int) -> None:
    """Limit the private memory of a process to what it has now and `added_bytes`.

    Raises: OSError, ValueError.
    """
    limit = status_bytes("VmData", pid) + added_bytes
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))


def limit_self(config: ChaosConfig) -> list[str]:
    """Set the limits that a process takes upon itself before it begins; return what could not be set, and why."""
    missing = []
    if config.cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (config.cpu_s, config.cpu_s + 1))
    if config.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (config.file_bytes, config.file_bytes))
    if config.disk_bytes is not None and config.disk is not None:
        try:
            mount_disk(config.disk, config.disk_bytes)
        except OSError as error:
            missing.append(f"disk: a file system of its own is not permitted here ({error.strerror})")
    return missing


def mount_disk(folder: Path, size_bytes: int) -> None:
    """Put a file system of a size at a folder, which this process and its children alone see.

    Raises: OSError.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_USER | _NEW_MOUNTS), folder)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    folder.mkdir(parents=True, exist_ok=True)
    _check(libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None), folder)
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size_bytes}".encode()), folder)


def _check(status: int, folder: Path) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))


def with_strace(config: ChaosConfig, command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command whose writes are slow or fail, and what could not be set, and why."""
    faults = []
    if config.slow_write_s is not None:
        faults.append(f"write,pwrite64,writev:delay_enter={int(config.slow_write_s * 1e6)}")
    if config.fail_write is not None:
        faults.append(f"write,pwrite64,writev:error={config.write_error}:when={config.fail_write}+")
    if not faults:
        return list(command), []
    strace = shutil.which("strace")
    if strace is None:
        return list(command), ["writes: slow and failing writes need strace, which is not installed"]
    injections = [word for fault in faults for word in ("-e", f"inject={fault}")]
    return [strace, "-f", "-qq", "-o", os.devnull, "-e", "trace=write,pwrite64,writev", *injections, *command], []

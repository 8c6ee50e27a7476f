"""strace's lines become the same records, whichever way it cut them up."""

import time

import pytest

from entrenar.errors import MachineError
from entrenar.trace import strace
from entrenar.trace.strace import StraceReader

LINES = """\
101 1700000000.000000100 execve("/usr/bin/cat", [...], 0x7ffd /* 3 vars */) = 0 <0.000300123>
101 1700000000.000001000 openat(AT_FDCWD</work>, "/etc/hostname", O_RDONLY) = 3</etc/hostname> <0.000012000>
101 1700000000.000002000 read(3</etc/hostname>, ""..., 64) = 3 <0.000010500>
102 1700000000.000003000 futex(0x7f0, FUTEX_WAIT, 0, NULL <unfinished ...>
101 1700000000.000004000 openat(AT_FDCWD</work>, "/none", O_RDONLY) = -1 ENOENT (No such file) <0.000009000>
102 1700000000.000005000 <... futex resumed>) = 0 <0.001000000>
101 1700000000.000006000 --- SIGCHLD {si_signo=SIGCHLD} ---
101 1700000000.000007000 pread64(3</a b>, ""..., 8, 0) = 8 (DELAYED) <0.005000000>
101 1700000000.000008000 exit_group(0) = ?
101 1700000000.000009000 +++ exited with 0 +++
101 1700000000.000009500 read(3</etc/hosts>, ""
nonsense
"""


def test_lines_become_calls():
    """Name, thread, time, result, error, bytes, file; a call that was cut in two is one, from its beginning."""
    calls = list(StraceReader().read(LINES.splitlines(keepends=True)))
    fields = ("name", "tid", "duration_ns", "result", "error", "size_bytes", "path")
    rows = [tuple(getattr(call, name) for name in fields) for call in calls]
    assert rows == [
        ("execve", 101, 300_123, 0, None, None, "/usr/bin/cat"),
        ("openat", 101, 12_000, 3, None, None, "/work"),
        ("read", 101, 10_500, 3, None, 3, "/etc/hostname"),
        ("openat", 101, 9_000, -1, "ENOENT", None, "/work"),
        ("futex", 102, 1_000_000, 0, None, None, None),
        ("pread64", 101, 5_000_000, 8, None, 8, "/a b"),
        ("exit_group", 101, None, None, None, None, None),
    ]
    offset = time.time_ns() - time.monotonic_ns()
    assert calls[4].start_ns == pytest.approx(1_700_000_000 * 10**9 + 3_000 - offset, abs=10**9)


def test_without_strace_the_error_says_so(monkeypatch, tmp_path):
    """The remedy is named."""
    monkeypatch.setattr(strace.shutil, "which", lambda _: None)
    with pytest.raises(MachineError, match="there is no strace on this machine; install it"):
        strace.command(["true"], tmp_path / "out")

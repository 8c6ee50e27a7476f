"""A lock has one holder, and a dead one is none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar import locks
from entrenar.errors import MachineError

_HOLD = """
import sys
from pathlib import Path
from entrenar import locks
with locks.held(Path(sys.argv[1]), "runs/a"):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    """Both ways to ask name the thing and the process; once that has ended, the lock is free."""
    path = tmp_path / ".lock"
    with _holder(path) as process:
        message = f"runs/a is in use by process {process.pid}: wait for its end or stop it, or choose another name"
        with pytest.raises(MachineError, match=message):
            locks.check_free(path, "runs/a")
        with pytest.raises(MachineError, match=message), locks.held(path, "runs/a"):
            pytest.fail("held twice")
    with locks.held(path, "runs/a"):
        pass


def test_what_a_killed_holder_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """The file is still there, with its number; the lock went with the process."""
    path = tmp_path / ".lock"
    with _holder(path) as process:
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == f"{process.pid}\n"
    locks.check_free(path, "runs/a")
    with locks.held(path, "runs/a"):
        assert path.read_text() != f"{process.pid}\n"


def test_asking_makes_no_file_and_takes_nothing(tmp_path: Path) -> None:
    """A folder is not touched before the run begins there."""
    path = tmp_path / ".lock"
    locks.check_free(path, "runs/a")
    assert not path.exists()
    path.touch()
    locks.check_free(path, "runs/a")
    with locks.held(path, "runs/a"):
        pass


def test_a_look_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may look at once; who takes the lock meanwhile asks again and has it; without a file nobody holds it."""
    path = tmp_path / ".lock"
    assert not locks.is_held(path)
    path.touch()
    look = os.open(path, os.O_RDONLY)
    locks.fcntl.flock(look, locks.fcntl.LOCK_SH)
    assert not locks.is_held(path)
    monkeypatch.setattr(locks.time, "sleep", lambda _: os.close(look))
    with locks.held(path, "x"):
        assert locks.is_held(path)
    assert not locks.is_held(path)


def test_a_lock_that_cannot_be_written_is_the_machines_fault(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(MachineError, match=r"cannot write .*no/\.lock"), locks.held(tmp_path / "no" / ".lock", "x"):
        pytest.fail("held")


def test_a_file_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the run goes on as it did before there were locks."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locks.held(tmp_path / ".lock", "x"):
        pass

"""Files are whole or are not there, whatever happens while they are written."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar import files
from entrenar.errors import DiskFullError, FormatError, MachineError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    """After a write the file holds the new content, text as UTF-8, and the folder holds only the file."""
    target = tmp_path / "a.txt"
    files.atomic_write(target, b"old")
    files.atomic_write(target, "neu: ß")
    assert target.read_bytes() == "neu: ß".encode()
    assert _names(tmp_path) == ["a.txt"]


@pytest.mark.chaos
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_atomic_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """When fsync or rename fails, the old content stays and the temporary file is gone."""
    target = tmp_path / "a.txt"
    files.atomic_write(target, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(DiskFullError, match=r"no space left to write .*a\.txt \(No space left on device\); free space"):
        files.atomic_write(target, b"new")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["a.txt"]


@pytest.mark.chaos
def test_the_file_size_limit_of_the_kernel_is_a_full_disk(tmp_path: Path) -> None:
    """A real EFBIG from the kernel becomes DiskFullError and leaves the old content."""
    target = tmp_path / "a.txt"
    files.atomic_write(target, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskFullError, match="File too large"):
            files.atomic_write(target, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == b"old"


def test_a_place_that_refuses_writing_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EROFS says which path cannot be written and why."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MachineError, match=r"cannot write .*a\.txt: Read-only file system"):
        files.atomic_write(tmp_path / "a.txt", b"x")


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - {errno.EINTR}))
def test_every_error_of_the_system_is_explained(tmp_path: Path, number: int) -> None:
    """There is no list of those that count: whatever the system says, the message names the file."""
    expected = DiskFullError if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else MachineError
    with pytest.raises(expected, match=r"a\.txt"), files.explained_disk_errors(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """It may have been moved away under a run."""
    with pytest.raises(MachineError, match=r"cannot write .*a\.txt: No such file or directory"):
        files.atomic_write(tmp_path / "no" / "a.txt", b"x")


def test_atomic_directory_appears_whole_and_makes_its_parents(tmp_path: Path) -> None:
    """The folder is not there inside the block and is complete after it."""
    target = tmp_path / "x" / "y" / "folder"
    with files.atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert _names(target.parent) == ["folder"]


def test_atomic_directory_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is fsynced before the rename, and the parent after it."""
    log: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(files, "fsync_file", lambda path: log.append(path.name))
    monkeypatch.setattr(files, "fsync_directory", lambda path: log.append(f"{path.name}/"))
    monkeypatch.setattr(Path, "rename", lambda self, target: (log.append("rename"), rename(self, target))[1])
    with files.atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        (temporary / "b").write_text("2")
    assert log[:3] == ["a", "sub/", "b"]
    assert log[3].startswith(files.TEMPORARY_PREFIX)
    assert log[4:] == ["rename", f"{tmp_path.name}/"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_atomic_directory_replaces_an_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    """A folder at the target is replaced as a whole, with and without the kernel's exchange."""
    target = tmp_path / "folder"
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for content in ("old", "new"):
        with files.atomic_directory(target) as temporary:
            (temporary / content).write_text(content)
    assert _names(target) == ["new"]
    assert _names(tmp_path) == ["folder"]


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    """When the block raises, the error comes through, the old folder stays, and nothing else is left."""
    target = tmp_path / "folder"
    with files.atomic_directory(target) as temporary:
        (temporary / "old").write_text("1")

    def interrupted() -> None:
        with files.atomic_directory(target) as temporary:
            (temporary / "new").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _names(target) == ["old"]
    assert _names(tmp_path) == ["folder"]


@pytest.mark.chaos
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("call", ["os.fsync", "Path.rename", "shutil.rmtree", "_exchange"])
def test_a_kill_before_any_call_of_a_replacement_loses_neither_folder(
    tmp_path: Path, call: str, *, can_exchange: bool
) -> None:
    """Killed at its n-th fsync, rename, exchange or delete, a replacement leaves the old or the new folder whole."""
    target = tmp_path / "folder"
    seen = set()
    for count in range(1, 20):
        with files.atomic_directory(target) as temporary:
            (temporary / "content").write_text("old")
        script = _KILLER.format(call=call, count=count, can_exchange=can_exchange, target=str(target))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        status = subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode
        files.remove_incomplete(tmp_path)
        seen.add((target / "content").read_text())
        assert _names(tmp_path) == ["folder"]
        if status != -signal.SIGKILL:
            break
    assert status == 0
    assert "new" in seen


_KILLER = """
import os, shutil, signal
from pathlib import Path
from entrenar import files
left = {count}
def deadly(call):
    def run(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return run
if not {can_exchange}:
    files._exchange = lambda *_: False
owner, name = dict(os=(os, "fsync"), Path=(Path, "rename"), shutil=(shutil, "rmtree"), _exchange=(files, "_exchange"))[
    "{call}".split(".")[0]
]
setattr(owner, name, deadly(getattr(owner, name)))
with files.atomic_directory(Path({target!r})) as temporary:
    (temporary / "content").write_text("new")
"""


def test_remove_incomplete_deletes_leftovers_and_restores_what_stepped_aside(tmp_path: Path) -> None:
    """Leftover files and folders go, others stay, and a folder caught between two renames comes back."""
    (tmp_path / f"{files.TEMPORARY_PREFIX}a-1").mkdir()
    (tmp_path / f"{files.TEMPORARY_PREFIX}b-2").write_text("x")
    (tmp_path / "mine").write_text("x")
    (tmp_path / ".replaced-lost").mkdir()
    (tmp_path / ".replaced-mine").mkdir()
    removed = files.remove_incomplete(tmp_path)
    assert _names(tmp_path) == ["lost", "mine"]
    assert len(removed) == 3
    assert files.remove_incomplete(tmp_path / "absent") == []


def test_sha256_file_is_that_of_the_content(tmp_path: Path) -> None:
    """The hash of a file longer than one block is hashlib's of the whole content."""
    path = tmp_path / "a"
    content = b"abc" * 700_000
    path.write_bytes(content)
    assert files.sha256_file(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"abc")
    assert files.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    """What is written is read back; NaN is not written; what is not JSON is a FormatError that names the file."""
    path = tmp_path / "a.json"
    value = {"a": [1, 2.5, None, "ß"], "b": {"c": True}}
    files.write_json(path, value)
    assert files.read_json(path) == value
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == value
    for damage in (b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match=r"a\.json is not valid JSON"):
            files.read_json(path)


_KILLED = """
import os, signal, sys
from pathlib import Path
from entrenar import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as place:
    (place / "a" if place.is_dir() else place).write_text("half")
    print(place, flush=True)
    sys.stdin.read()
"""


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path, kind: str) -> None:
    """The next write to the same place cleans up; another name's leftovers are another's."""
    target = tmp_path / "model"
    write = getattr(files, kind)

    def begun(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _KILLED, kind, str(path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with begun(target) as killed, begun(target) as living, begun(tmp_path / "model-2") as other:
        places = [Path(process.stdout.readline().strip()) for process in (killed, living, other)]
        for process in (killed, other):
            process.send_signal(signal.SIGKILL)
            process.wait()
        with write(target) as place:
            assert [path.exists() for path in places] == [False, True, True]
            if place.is_dir():
                (place / "a").write_text("whole")
        assert target.exists()
        living.kill()
    with write(target):
        pass
    assert _names(tmp_path) == sorted([places[2].name, "model"])

"""A checkpoint is whole or refused: no byte of it can change unnoticed, and the newest whole one is found."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from train_toy import write_model

from entrenar.errors import CheckpointError, DiskFullError, OutOfMemoryError
from entrenar.files import sha256_file
from entrenar.runs import checkpoint_name, list_checkpoints
from entrenar.train import check_same_config, checkpoint, git_revision, latest_good, load, manifest, verify
from entrenar.train.checkpoint import Snapshot

STATE = {
    "rng": {"python": [], "numpy": {}, "torch": "", "cuda": []},
    "monitor": {"windows": {}, "dead_steps": 0, "slow_steps": 0, "skipped_steps": 0},
    "rows": None, "config": {}, "git_revision": "abc",
}  # fmt: skip


def _snapshot(step: int, held_out_loss: float | None = None) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        step=step,
        weights={"w": torch.randn(4, 3, generator=generator)},
        optimizer={"w.mean": torch.randn(4, 3, generator=generator), "step": torch.tensor(float(step))},
        state=STATE | {"counters": {"step": step}, "loader": {"index": step}},
        held_out_loss=held_out_loss,
    )


def _write(folder: Path, step: int, held_out_loss: float | None = None) -> Path:
    path = folder / checkpoint_name(step)
    checkpoint.write(path, _snapshot(step, held_out_loss), write_model, staged=lambda: None, before_commit=lambda: None)
    return path


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    """Step, state, weights and moments come back exactly, and the manifest lists every file."""
    path = _write(tmp_path, 7, held_out_loss=1.5)
    loaded, original = load(path), _snapshot(7)
    assert (loaded.step, loaded.state, loaded.loader_state) == (7, original.state, {"index": 7})
    assert torch.equal(loaded.optimizer()["w.mean"], original.optimizer["w.mean"])
    assert (loaded.model / "model.safetensors").is_file()
    listed = verify(path)
    assert listed["files"].keys() == {"model/model.safetensors", "optimizer.safetensors", "state.json"}
    assert (listed["held_out_loss"], listed["git_revision"]) == (1.5, "abc")


@pytest.mark.chaos
def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """One flipped bit at any of 100 places in any file of the checkpoint, manifest included, is refused."""
    path, chance = _write(tmp_path, 1), random.Random(0)
    for file in [file for file in sorted(path.rglob("*")) if file.is_file()]:
        content = file.read_bytes()
        for _ in range(100):
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"damaged|no readable manifest"):
                verify(path)
        file.write_bytes(content)
    verify(path)


@pytest.mark.chaos
@pytest.mark.parametrize("kept", [0, 1, -2])
def test_every_truncation_is_noticed(tmp_path: Path, kept: int) -> None:
    """A file cut to nothing, to one byte, or by its last byte but a newline is refused, with the file's name."""
    path = _write(tmp_path, 1)
    for file in [file for file in sorted(path.rglob("*")) if file.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match=file.name):
            verify(path)
        file.write_bytes(content)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    """A missing file and an altered one are both in the message."""
    path = _write(tmp_path, 1)
    (path / "state.json").unlink()
    (path / "optimizer.safetensors").write_bytes(b"x" * (path / "optimizer.safetensors").stat().st_size)
    message = r"optimizer.safetensors does not match its sha256; state.json cannot be read \(No such file"
    with pytest.raises(CheckpointError, match=message):
        verify(path)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    """A manifest whose hashes were made to fit other files does not fit its own hash."""
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": 2}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its content does not match its own sha256"):
        load(path)
    (path / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def _forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and give it the hash that fits."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    (path / "manifest.json").write_text(json.dumps(content | {"manifest_sha256": manifest._hash(content)}))


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


def _set_file(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["files"].update({name: value})


_SHA = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("step", None), "step must be a whole number, got None"),
        (lambda content: content.update(step=True), "step must be a whole number, got True"),
        (_set("step", -1), "step must be a whole number, got -1"),
        (_set("held_out_loss", "low"), "held_out_loss must be a number or null"),
        (_set("files", None), "files must be a table of names"),
        (_set("files", ["state.json"]), "files must be a table of names"),
        (_set("files", {}), "it lists no optimizer.safetensors"),
        (lambda content: content["files"].pop("state.json"), "it lists no state.json"),
        (lambda content: content["files"].pop("model/model.safetensors"), "it lists no model/"),
        (_set_file("../step-00000001/state.json", _SHA), "lies outside the checkpoint"),
        (_set_file("/etc/hostname", _SHA), "lies outside the checkpoint"),
        (_set_file("", _SHA), "lies outside the checkpoint"),
        (_set_file("state.json", None), "state.json needs a size and a sha256, got None"),
        (_set_file("state.json", {"size": "9", "sha256": "0"}), "state.json needs a size and a sha256"),
        (_set_file("state.json", {"size": 9}), "state.json needs a size and a sha256"),
        (_set_file("model/other.safetensors", _SHA), "model/other.safetensors cannot be read"),
        (lambda content: content.pop("version"), "has checkpoint format None"),
    ],
)
def test_a_forged_manifest_is_stepped_over(tmp_path: Path, change: Callable[[Any], None], told: str) -> None:
    """With a hash that fits, each entry is looked at: nothing is read outside, nothing unlisted is trusted."""
    _write(tmp_path, 1)
    _forge(_write(tmp_path, 2), change)
    found = latest_good(tmp_path)
    assert found.step == 1
    assert told in found.skipped[0]


def test_a_forged_manifest_is_not_counted_among_those_to_keep(tmp_path: Path) -> None:
    """With one checkpoint to keep, the good one stays beside it."""
    _write(tmp_path, 1)
    _forge(_write(tmp_path, 2), _set("files", {}))
    checkpoint.prune(tmp_path, newest=2, keep_last=1, keep_best=True)
    assert list(list_checkpoints(tmp_path)) == [1, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: [], "it must be a table"),
        (lambda state: state | {"counters": None}, "counters must be a table"),
        (lambda state: state | {"counters": {"step": 3}}, "its step is 3, the manifest's 2"),
        (lambda state: {key: value for key, value in state.items() if key != "rng"}, "rng must be a table"),
        (lambda state: {key: value for key, value in state.items() if key != "loader"}, "loader is missing"),
        (lambda state: state | {"monitor": {}}, "monitor.windows is missing"),
        (lambda state: state | {"rng": {}}, "rng.python is missing"),
    ],
)
def test_a_state_that_no_run_can_go_on_from_is_stepped_over(
    tmp_path: Path, change: Callable[[Any], Any], told: str
) -> None:
    """Its hash fits, and still it is looked at before a run is set up with it."""
    _write(tmp_path, 1)
    path = _write(tmp_path, 2)
    (path / "state.json").write_text(json.dumps(change(json.loads((path / "state.json").read_text()))))
    entry = {"size": (path / "state.json").stat().st_size, "sha256": sha256_file(path / "state.json")}
    _forge(path, _set_file("state.json", entry))
    found = latest_good(tmp_path)
    assert found.step == 1
    assert told in found.skipped[0]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model/model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link"])
def test_what_is_no_file_is_stepped_over_and_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    """In the place of a file: a folder, a pipe nobody writes to, an endless device, a link to the right content."""
    _write(tmp_path, 1)
    place = _write(tmp_path, 2) / name
    kept = place.rename(tmp_path / "kept")
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if kind == "device" else kept)
    found = latest_good(tmp_path)
    assert found.step == 1
    assert "regular file" in found.skipped[0]


@pytest.mark.parametrize("name", ["model", ""])
def test_a_folder_that_is_a_link_is_stepped_over(tmp_path: Path, name: str) -> None:
    """Its content lies elsewhere, where nobody keeps it from changing."""
    _write(tmp_path / "checkpoints", 1)
    place = _write(tmp_path / "checkpoints", 2) / name
    place.rename(tmp_path / "kept")
    place.symlink_to(tmp_path / "kept")
    found = latest_good(tmp_path / "checkpoints")
    assert found.step == 1
    assert "is a link to a folder elsewhere" in found.skipped[0]


@pytest.mark.parametrize(("content", "told"), [(b"", "cannot be read"), (None, "it holds no step count")])
def test_moments_that_are_none_are_stepped_over(tmp_path: Path, content: bytes | None, told: str) -> None:
    """With hashes that fit: an empty file, and one of another kind."""
    _write(tmp_path, 1)
    file = _write(tmp_path, 2) / "optimizer.safetensors"
    if content is None:
        save_file({"other": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    _forge(file.parent, _set_file(file.name, {"size": file.stat().st_size, "sha256": sha256_file(file)}))
    found = latest_good(tmp_path)
    assert found.step == 1
    assert told in found.skipped[0]


def test_every_file_of_a_checkpoint_is_as_readable_as_the_user_wants_it(tmp_path: Path) -> None:
    """By the umask, moments too."""
    before = os.umask(0o027)
    try:
        path = _write(tmp_path, 1)
    finally:
        os.umask(before)
    assert (path / "optimizer.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_copy_under_another_step_is_not_taken(tmp_path: Path) -> None:
    """`cp -r step-00000002 step-00000999`: it is reported with its remedy, and the right one is resumed."""
    shutil.copytree(_write(tmp_path, 2), tmp_path / "step-00000999")
    found = latest_good(tmp_path)
    assert (found.step, found.path.name) == (2, "step-00000002")
    assert "holds step 2: a copy under another name" in found.skipped[0]
    shutil.rmtree(found.path)
    with pytest.raises(CheckpointError, match="give it back the name step-00000002"):
        latest_good(tmp_path)


def test_what_is_moved_is_durable_before_anything_else_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting, setting aside and abandoning each end with the folders on disk; a second time replaces the first."""
    synced: list[str] = []
    monkeypatch.setattr(checkpoint, "fsync_directory", lambda path: synced.append(path.name))
    for _ in range(2):
        for step in (1, 2, 3):
            _write(tmp_path / "checkpoints", step)
        synced.clear()
        checkpoint.move(tmp_path / "checkpoints" / "step-00000003", tmp_path / "rescue")
        assert synced == ["checkpoints", "rescue"]
        assert load(tmp_path / "rescue" / "step-00000003").step == 3
        synced.clear()
        checkpoint.remove(tmp_path / "checkpoints" / "step-00000002")
        assert synced == ["checkpoints"]
        synced.clear()
        checkpoint.abandon_after(tmp_path / "checkpoints", 0)
        assert synced == ["checkpoints"]
        synced.clear()
        assert checkpoint.abandon_after(tmp_path / "checkpoints", 0) == []
        assert synced == []


def test_a_manifest_in_another_order_is_the_same(tmp_path: Path) -> None:
    """Its hash is of the content, not of the order in which another program wrote the keys."""
    path = _write(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert load(path).step == 1


def test_a_checkpoint_before_the_first_step_is_one(tmp_path: Path) -> None:
    """Step 0 is a step."""
    assert load(_write(tmp_path, 0)).step == 0


def test_files_that_nobody_vouches_for_are_told_in_order(tmp_path: Path) -> None:
    """A message is the same on every file system."""
    path = _write(tmp_path, 1)
    names = [f"{letter}.txt" for letter in "qwertyuiop"]
    for name in names:
        (path / name).write_text("x")
    assert manifest.faults_of_files(path, manifest.read_manifest(path)) == [
        f"{name} is not in the manifest" for name in sorted(names)
    ]


def test_a_file_that_nobody_vouches_for_is_told(tmp_path: Path) -> None:
    """Weights laid next to the ones that were saved would be read with them; a hidden file of a file system not."""
    path = _write(tmp_path, 1)
    (path / "model" / ".nfs0001").write_text("x")
    assert load(path).step == 1
    (path / "model" / "model-2.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match=r"model/model-2\.safetensors is not in the manifest"):
        load(path)


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a later format says which version wrote it."""
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    path = _write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has checkpoint format 2, this program reads 1; use the version that"):
        load(path)


def test_the_latest_whole_one_wins_and_damaged_ones_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the two newest damaged, the third is taken; both are logged as warnings and listed with their reasons."""
    for step in (1, 2, 10, 30):
        _write(tmp_path, step)
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        found = latest_good(tmp_path)
    assert found.step == 2
    assert ["step-00000030" in found.skipped[0], "step-00000010" in found.skipped[1]] == [True, True]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert list(list_checkpoints(tmp_path)) == [1, 2, 10, 30]


def test_without_a_whole_one_the_error_says_why(tmp_path: Path) -> None:
    """An absent folder, an empty one, and one of damaged checkpoints each say what was found."""
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: there are none; start a new run"):
            latest_good(folder)
    (_write(tmp_path, 3) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .* state\.json has 2 bytes instead of"):
        latest_good(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [(1, False, [5]), (2, False, [4, 5]), (1, True, [2, 5]), (9, True, [1, 2, 3, 4, 5])],
)
def test_retention_keeps_the_last_and_the_best(
    tmp_path: Path,
    keep_last: int,
    left: list[int],
    *,
    keep_best: bool,
) -> None:
    """The last k and the lowest held-out loss stay, everything else up to the newest goes."""
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 1.5], start=1):
        _write(tmp_path, step, loss)
    checkpoint.prune(tmp_path, newest=5, keep_last=keep_last, keep_best=keep_best)
    assert list(list_checkpoints(tmp_path)) == left


def test_retention_never_deletes_the_newest_nor_later_ones(tmp_path: Path) -> None:
    """Between damaged manifests the newest stays, though it is not the best, and later steps are left alone."""
    for step in (1, 2, 3, 9):
        _write(tmp_path, step, float(step))
    for step in (2, 3):
        (tmp_path / checkpoint_name(step) / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, newest=3, keep_last=1, keep_best=False)
    assert list(list_checkpoints(tmp_path)) == [1, 3, 9]


def test_abandoned_checkpoints_are_kept_under_another_name(tmp_path: Path) -> None:
    """Checkpoints newer than the step resumed from are renamed, twice if need be, and no longer listed."""
    for _ in range(2):
        for step in (1, 2, 3):
            _write(tmp_path, step)
        assert [path.name for path in checkpoint.abandon_after(tmp_path, 1)] == [
            "abandoned-step-00000002",
            "abandoned-step-00000003",
        ]
    assert list(list_checkpoints(tmp_path)) == [1]
    assert load(tmp_path / "abandoned-step-00000003").step == 3


@pytest.mark.chaos
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_is_recognized_behind_safetensors(tmp_path: Path, part: str) -> None:
    """When safetensors meets the kernel's file-size limit, the error is DiskFullError and nothing is left behind."""
    _write(tmp_path, 1)
    snapshot = _snapshot(2)
    big = {"w": torch.zeros(100_000)}
    changed = {"weights": big} if part == "model" else {"optimizer": big}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    staged = []
    try:
        with pytest.raises(DiskFullError, match=r"no space left to write .*step-00000002"):
            checkpoint.write(
                tmp_path / "step-00000002",
                Snapshot(**(vars(snapshot) | changed)),
                write_model,
                staged=lambda: staged.append(1),
                before_commit=lambda: None,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert staged
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_good(tmp_path).step == 1


def test_weights_of_another_model_are_refused() -> None:
    """A missing weight and one of another shape or type are refused by name."""
    own = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="has no weight b; it belongs to another model"):
        checkpoint.restore_weights(own, {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"weight b must be torch.float32 \(3,\), .* torch.bfloat16 \(3,\)"):
        checkpoint.restore_weights(own, {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)})
    checkpoint.restore_weights(own, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)})
    assert own["b"].tolist() == [1.0, 1.0, 1.0]


def test_a_changed_config_is_shown_difference_by_difference() -> None:
    """Changed, added and removed settings are all shown; equal lists and tuples are no difference."""
    saved = {"optim": {"lr": 0.1, "betas": [1, 2]}, "train": {"seed": 0, "old": 1}}
    now = {"optim": {"lr": 0.2, "betas": (1, 2)}, "train": {"seed": 0, "new": None}}
    check_same_config(saved, saved)
    with pytest.raises(CheckpointError) as caught:
        check_same_config(saved, now)
    lines = str(caught.value).splitlines()
    assert lines[1:4] == ["  optim.lr: 0.1 -> 0.2", "  train.new: (absent) -> None", "  train.old: 1 -> (absent)"]
    assert lines[4].startswith("resume with the config it was made with, or allow")
    check_same_config(saved, now, may_differ={"optim.lr", "train.new", "train.old"})


def test_differences_of_a_config_come_in_order():
    """The same message each time, whatever the order of the keys."""
    names = [f"key{number}" for number in range(10)]
    with pytest.raises(CheckpointError) as error:
        check_same_config(dict.fromkeys(names, 1), dict.fromkeys(reversed(names), 2))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]] == names


def test_the_git_revision_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a repository it is None, inside the commit, and with changes it says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision() == commit
    (tmp_path / "a").write_text("2")
    assert git_revision() == commit + "+dirty"
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_a_removed_checkpoint_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of a deletion leaves no half checkpoint under its name."""
    path = _write(tmp_path, 1)
    delete, calls = shutil.rmtree, []

    def crash(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        delete(*arguments, **named)

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove(path)
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("sentence", "error", "told"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", DiskFullError, "no space left"),
        ("Error while serializing: header too large", SafetensorError, "header too large"),
    ],
)
def test_a_disk_error_inside_safetensors_is_told_as_one(tmp_path: Path, sentence: str, error: type, told: str) -> None:
    """The number of the system's error is read from the sentence; another fault of the library stays what it is."""

    def failing(_folder: Path, _weights: object) -> None:
        raise SafetensorError(sentence)

    with pytest.raises(error, match=told):
        checkpoint.write(
            tmp_path / "step-00000001", _snapshot(1), failing, staged=lambda: None, before_commit=lambda: None
        )


def test_what_cannot_be_deleted_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is renamed away first; files that stay behind are no checkpoint and no error."""
    path = tmp_path / "step-1"
    path.mkdir()

    def failing(folder: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(f"cannot delete {folder}")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", failing)
    checkpoint.remove(path)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (checkpoint, "safe_open", RuntimeError("unable to mmap 61 bytes from file <x>: Cannot allocate memory (12)")),
        (checkpoint, "safe_open", SafetensorError("I/O error: Cannot allocate memory (os error 12)")),
        (checkpoint, "read_json", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (manifest, "sha256_file", OSError(errno.ENOMEM, "Cannot allocate memory")),
        (manifest, "sha256_file", MemoryError()),
        (manifest, "read_json", OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_a_checkpoint_that_does_not_fit_into_memory_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: Exception
) -> None:
    """Short memory ends the search with its own error: an older checkpoint must not be taken for the newest."""
    _write(tmp_path, 1)
    _write(tmp_path, 2)

    def short(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, name, short)
    with pytest.raises(OutOfMemoryError, match=r"reading the checkpoint .*step-00000002"):
        latest_good(tmp_path)

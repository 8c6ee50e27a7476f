"""After a power loss at any moment of a save there is the old checkpoint or the new one, whole; a lost fsync shows."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash_states import Count, Recorder, Tree, build, states
from train_toy import Toy, held_out, toy_settings, toy_task

from entrenar import files
from entrenar.errors import CheckpointError
from entrenar.files import atomic_directory, atomic_write, remove_incomplete
from entrenar.runs import read_records
from entrenar.train import Run, checkpoint, fit, latest_good
from entrenar.train.metrics import RecordFile


def _files(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _record_saves(folder: Path) -> tuple[Recorder, dict[int, Tree]]:
    """Train through three saves, of which the last one stays; return the record and each checkpoint as it was."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    recorder, saved = Recorder(checkpoints), {}
    module = Toy()

    def on_event(event) -> None:
        if event.kind == "checkpoint_saved":
            saved[event.step] = _files(checkpoints / event.message)
            recorder.promise(event.step)

    task = toy_task(module, evaluate=held_out(module))
    settings = toy_settings(max_steps=9, save_every=3, keep_last=1, keep_best=False, eval_every=0)
    with recorder.watching():
        fit(task, settings, Run(folder, {}), on_event=on_event)
    return recorder, saved


def _faults(recorder: Recorder, saved: dict[int, Tree], place: Path, count: Count) -> Iterator[str]:
    """Open every state as a resume does, and yield what is wrong with it."""
    for moment, tree in states(recorder, count):
        build(tree, place)
        for when in ("found", "tidied up"):
            try:
                good = latest_good(place)
            except CheckpointError as error:
                if moment.mark is not None:
                    yield f"{moment.done}, {when}: neither, though step {moment.mark} was saved ({error})"
            else:
                if good.step < (moment.mark or 0):
                    yield f"{moment.done}, {when}: step {good.step}, though step {moment.mark} was saved"
                if good.step in saved and _files(good.path) != saved[good.step]:
                    yield f"{moment.done}, {when}: step {good.step} is another than was saved"
            remove_incomplete(place)


def test_a_power_loss_leaves_the_old_checkpoint_or_the_new(tmp_path):
    """Every state of three saves and two deletions opens at the newest saved step or a later one, byte for byte."""
    recorder, saved = _record_saves(tmp_path)
    count = Count()
    assert list(saved) == [3, 6, 9]
    assert list(_faults(recorder, saved, tmp_path / "place", count)) == []
    assert {moment.mark for moment in recorder.moments} == {None, 3, 6, 9}
    assert sum(moment.done == "fsync" for moment in recorder.moments) > 15
    assert count.built > 5000
    assert count.different > 10


@contextmanager
def _lost(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> Iterator[None]:
    """Leave out the named fsyncs."""
    with monkeypatch.context() as patched:
        for name in names:
            for module in (files, checkpoint):
                if hasattr(module, name):
                    patched.setattr(module, name, lambda _: None)
        yield


@pytest.mark.parametrize("lost", ["fsync_file", "fsync_directory", "_fsync_tree"])
def test_a_lost_fsync_is_found(tmp_path, monkeypatch, lost):
    """Without the fsync of files, of folders, or of what a folder holds, a power loss leaves neither checkpoint."""
    with _lost(monkeypatch, (lost,)):
        recorder, saved = _record_saves(tmp_path)
    assert any("neither" in fault for fault in _faults(recorder, saved, tmp_path / "place", Count()))


def _old_or_new(
    tmp_path: Path, replace: Callable[[Path], None], allowed: list[Tree], *, is_tidied: bool
) -> tuple[list[Tree], Count]:
    """Record `replace`, and return the states that are none of the allowed ones."""
    root = tmp_path / "root"
    recorder, count = Recorder(root), Count()
    with recorder.watching():
        replace(root)
    wrong = []
    for _, tree in states(recorder, count):
        build(tree, tmp_path / "place")
        if is_tidied:
            remove_incomplete(tmp_path / "place")
        found = {path: content for path, content in _files(tmp_path / "place").items() if ".incomplete-" not in path}
        if found not in allowed:
            wrong.append(found)
    return wrong, count


@pytest.mark.parametrize("lost", [(), ("fsync_file",)])
def test_a_file_that_is_replaced_is_the_old_one_or_the_new(tmp_path, monkeypatch, lost):
    """`atomic_write` leaves one of the two contents; without the fsync before the rename a torn one is found."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_bytes(b"old content")
    allowed: list[Tree] = [{"a": b"old content"}, {"a": b"the new content"}]
    with _lost(monkeypatch, lost):
        wrong, _ = _old_or_new(tmp_path, lambda r: atomic_write(r / "a", "the new content"), allowed, is_tidied=False)
    assert bool(wrong) == bool(lost)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("lost", [(), ("_fsync_tree",)])
def test_a_folder_that_is_replaced_is_the_old_one_or_the_new(tmp_path, monkeypatch, can_exchange, lost):
    """The same for a corpus or a model, with the kernel's exchange of two names and without it."""
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "root" / "model"
    target.mkdir(parents=True)
    (target / "a").write_bytes(b"old")
    (target / "b").write_bytes(b"old too")
    allowed: list[Tree] = [
        {"model": None, "model/a": b"old", "model/b": b"old too"},
        {"model": None, "model/a": b"new", "model/c": b"new too"},
    ]

    def replace(root: Path) -> None:
        with atomic_directory(root / "model") as folder:
            (folder / "a").write_bytes(b"new")
            (folder / "c").write_bytes(b"new too")

    with _lost(monkeypatch, lost):
        wrong, count = _old_or_new(tmp_path, replace, allowed, is_tidied=True)
    assert bool(wrong) == bool(lost)
    assert count.different >= 2


def test_records_that_were_synced_are_read_after_a_power_loss(tmp_path):
    """Whatever becomes of the last lines, those before the last sync are there, and no line is read wrong."""
    root = tmp_path / "root"
    root.mkdir()
    recorder, count = Recorder(root), Count()
    with recorder.watching():
        file = RecordFile(root / "metrics.jsonl", after_step=0)
        for step in range(1, 9):
            file.append({"step": step, "loss": 1 / step})
            os.truncate(root / "metrics.jsonl", (root / "metrics.jsonl").stat().st_size)  # a moment to look at
            if step % 3 == 0:
                file.sync()
                recorder.promise(step)
        file.rewind(6)
        recorder.promise(6)
        file.close()
    for moment, tree in states(recorder, count):
        build(tree, tmp_path / "place")
        read = list(read_records(tmp_path / "place" / "metrics.jsonl"))
        assert read == [{"step": step, "loss": 1 / step} for step in range(1, len(read) + 1)]
        assert len(read) >= (moment.mark or 0)
    assert count.different > 20

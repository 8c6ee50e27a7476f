"""Checkpoints are written beside the training: live tensors are read before they move, and failures are told."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from train_toy import write_model

from entrenar.errors import DiskFullError, OutOfMemoryError
from entrenar.runs import list_checkpoints
from entrenar.train.checkpoint import Snapshot
from entrenar.train.saver import Saver


def _snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"w": torch.full((3,), float(step))}, {"step": torch.tensor(1.0)}, {})


def test_it_returns_before_the_disk_has_answered_and_waits_only_until_the_tensors_are_read(tmp_path: Path) -> None:
    """`start` returns at once, `wait_staged` when the model is written, and the commit may come much later."""
    reading, committing = threading.Event(), threading.Event()
    order: list[str] = []

    def slow_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        reading.wait(10)
        write_model(folder, weights)
        order.append("read")

    def slow_commit() -> None:
        committing.wait(10)
        order.append("committed")

    saver = Saver(tmp_path, slow_model, before_commit=slow_commit)
    saver.start(_snapshot(4))
    assert saver.take(wait=False) is None
    order.append("started")
    reading.set()
    saver.wait_staged()
    order.append("moved")
    assert not list_checkpoints(tmp_path)
    committing.set()
    assert saver.take(wait=True) == (4, None)
    saver.close()
    assert order == ["started", "read", "moved", "committed"]
    assert list(list_checkpoints(tmp_path)) == [4]
    assert saver.take(wait=True) is None


def test_a_machine_failure_is_an_outcome_and_frees_the_loop(tmp_path: Path) -> None:
    """A full disk does not hang the loop: the tensors may move, and the outcome names the error."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, full, before_commit=lambda: None)
    saver.start(_snapshot(4))
    saver.wait_staged()
    step, error = saver.take(wait=True)
    saver.close()
    assert step == 4
    assert isinstance(error, DiskFullError)
    assert not list(tmp_path.iterdir())


def test_lack_of_memory_in_the_thread_is_an_outcome(tmp_path: Path) -> None:
    """When the writer runs out of memory the run hears of it as of a full disk."""

    def hungry(*_: object) -> None:
        raise MemoryError

    saver = Saver(tmp_path, hungry, before_commit=lambda: None)
    saver.start(_snapshot(4))
    _, error = saver.take(wait=True)
    saver.close()
    assert isinstance(error, OutOfMemoryError)
    assert str(error) == "memory ran out while writing a checkpoint (MemoryError)"


def test_thread_and_reserve_are_there_before_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the saver exists, a checkpoint needs no new thread, and has the reserve's memory while it is written."""
    held: list[int] = []

    def measuring(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        held.append(len(saver._reserve))
        write_model(folder, weights)

    saver = Saver(tmp_path, measuring, before_commit=lambda: None)
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread was started"))
    before = len(saver._reserve)
    saver.start(_snapshot(4))
    assert saver.take(wait=True) == (4, None)
    saver.close()
    assert before > 1 << 20
    assert held == [0]
    assert len(saver._reserve) == before


def test_a_fault_in_the_model_writer_comes_through(tmp_path: Path) -> None:
    """A programming error in the caller's writer is raised, not swallowed."""

    def broken(*_: object) -> None:
        raise KeyError("no such weight")

    saver = Saver(tmp_path, broken, before_commit=lambda: None)
    saver.start(_snapshot(4))
    saver.wait_staged()
    while not (tmp_path.exists() and saver._writing.done()):
        time.sleep(0.001)
    with pytest.raises(KeyError, match="no such weight"):
        saver.take(wait=False)
    saver.close()

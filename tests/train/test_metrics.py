"""Records are one story: a cut line is dropped, a resume forgets what came after it, NaN is null."""

import importlib.util
import json
import logging
import math
import resource
from contextlib import closing
from pathlib import Path

import pytest

from entrenar.errors import ConfigError, DiskFullError
from entrenar.runs import Event, RunFolder, StepRecord, read_records
from entrenar.train.metrics import RecordFile, TensorBoard, open_journal


def _record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, lr=0.1, grad_norm=2.0, targets=10, targets_per_s=5.0, elapsed_s=1.0, eta_s=None,
        epoch=0.5, held_out={"loss": 3.0}, phases_s={"forward": 0.1},
    )  # fmt: skip


def test_records_come_back_in_order(tmp_path: Path) -> None:
    """What was appended is read; a missing file has no records."""
    path = tmp_path / "run" / "metrics.jsonl"
    assert list(read_records(path)) == []
    records = RecordFile(path, after_step=0)
    for step in (1, 2):
        records.append({"step": step, "note": "ß\n"})
    records.sync()
    records.close()
    assert list(read_records(path)) == [{"step": 1, "note": "ß\n"}, {"step": 2, "note": "ß\n"}]


@pytest.mark.parametrize("tail", [b'{"step": 3', b'{"step": 3}', b'{"step"\n{"step": 4}\n', b"\xff\xfe\n", b"\x00" * 9])
def test_a_damaged_end_is_dropped_and_written_over(tmp_path: Path, tail: bytes) -> None:
    """A cut line, one without an end, garbage and zeros after a crash are dropped; the story goes on in clean lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_records(path)] == [1, 2]
    records = RecordFile(path, after_step=2)
    records.append({"step": 3})
    records.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_resume_drops_the_records_after_its_step(tmp_path: Path) -> None:
    """Records after the resumed step are gone, those up to it stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    RecordFile(path, after_step=3).close()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_a_resume_drops_what_is_no_record_of_a_step(tmp_path: Path) -> None:
    """Text, a list or null where the step should be was not written by a run, and does not stop the next one."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": "two"}\n{"step": null}\n{"step": [1]}\n{"step": 1, "loss": 2.0}\n')
    RecordFile(path, after_step=5).close()
    assert list(read_records(path)) == [{"step": 1, "loss": 2.0}]


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    """NaN and infinity are no JSON; they are written as null, nested ones too."""
    path = tmp_path / "metrics.jsonl"
    records = RecordFile(path, after_step=0)
    records.append({"step": 1, "loss": math.nan, "held_out": {"loss": -math.inf, "n": 2.0}})
    records.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "held_out": {"loss": None, "n": 2.0}}


def test_a_full_disk_is_a_disk_full_error(tmp_path: Path) -> None:
    """A write that the disk refuses is explained, and closing afterwards does not fail a second time."""
    records = RecordFile(tmp_path / "metrics.jsonl", after_step=0)
    records._stream.close()
    records._stream = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  # closed below
    with pytest.raises(DiskFullError, match=r"no space left to write .*metrics\.jsonl"):
        records.append({"step": 1})
    records.close()


@pytest.mark.chaos
def test_a_record_that_fits_in_part_leaves_no_part(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a line keeps the lines before it; later ones can follow."""
    path = tmp_path / "metrics.jsonl"
    with closing(RecordFile(path, after_step=0)) as records:
        records.append({"step": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        try:
            with pytest.raises(DiskFullError, match="no space left"):
                records.append({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        records.append({"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 3}]


def test_the_journal_tells_files_and_listeners(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A record goes into metrics.jsonl and to its callback, an event into events.jsonl, its callback and the log."""
    records, events = [], []
    journal = open_journal(RunFolder(tmp_path), records.append, events.append, after_step=0, is_on_board=False)
    with caplog.at_level(logging.INFO):
        journal.record(_record(1))
        journal.tell(Event(1, "loss_spike", "much"))
        journal.tell(Event(1, "checkpoint_saved", "x"), level=logging.INFO)
    journal.sync()
    journal.close()
    assert records == [_record(1)]
    assert [event.kind for event in events] == ["loss_spike", "checkpoint_saved"]
    assert next(read_records(tmp_path / "metrics.jsonl"))["held_out"] == {"loss": 3.0}
    assert next(read_records(tmp_path / "events.jsonl")) == {"step": 1, "kind": "loss_spike", "message": "much"}
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "step 1: loss_spike: much"),
        ("INFO", "step 1: checkpoint_saved: x"),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_scalars_back(tmp_path: Path) -> None:
    """TensorBoard's own reader finds loss and held-out loss at their steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, after_step=0)
    for step in (1, 2):
        board.append({"step": step, "loss": 4.0 - step, "held_out": {"loss": 3.0 + step}, "eta_s": None})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("held_out/loss")] == [(1, 4.0), (2, 5.0)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "held_out/loss"}


def test_a_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error names it, and no file of the run has been touched."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the tensorboard package; pip install 'entrenar\[tensorboard\]'"):
        open_journal(RunFolder(tmp_path), print, print, after_step=0, is_on_board=True)
    assert not list(tmp_path.iterdir())

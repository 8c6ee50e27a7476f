"""A run's folder is read by anyone, without torch: records as they were written, whatever a crash left of them."""

import json
import math
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from entrenar.errors import FormatError
from entrenar.runs import Event, RunFolder, StepRecord, checkpoint_name, list_checkpoints, read_records
from entrenar.train.metrics import open_journal

RECORD = StepRecord(
    step=3, loss=1.5, lr=0.1, grad_norm=2.0, targets=10, targets_per_s=5.0, elapsed_s=1.0, eta_s=None, epoch=0.5,
    held_out={"loss": 3.0}, phases_s={"forward": 0.1},
)  # fmt: skip


def written(folder: Path, *records: StepRecord, events: tuple[Event, ...] = ()) -> RunFolder:
    run = RunFolder(folder)
    journal = open_journal(run, lambda _: None, lambda _: None, after_step=0, is_on_board=False)
    with closing(journal):
        for record in records:
            journal.record(record)
        for event in events:
            journal.tell(event)
    return run


def test_what_train_writes_is_what_a_reader_gets(tmp_path: Path) -> None:
    """Step records and events come back equal, in order."""
    event = Event(2, "loss_spike", "loss 9 is 7.0 deviations above its usual 1")
    run = written(tmp_path, RECORD, events=(event,))
    assert list(run.read_steps()) == [RECORD]
    assert list(run.read_events()) == [event]


def test_a_loss_that_was_not_finite_is_nan(tmp_path: Path) -> None:
    """JSON holds null for NaN; the reader returns NaN, and keeps None where nothing was known."""
    run = written(tmp_path, StepRecord(**asdict(RECORD) | {"loss": math.inf, "grad_norm": math.nan}))
    (record,) = run.read_steps()
    assert math.isnan(record.loss)
    assert math.isnan(record.grad_norm)
    assert record.eta_s is None


def test_a_run_without_records_has_none(tmp_path: Path) -> None:
    """A folder in which nothing was written yet yields nothing."""
    run = RunFolder(tmp_path)
    assert [*run.read_steps(), *run.read_events(), *list_checkpoints(run.checkpoints)] == []


def test_a_field_of_a_later_version_is_left_out(tmp_path: Path) -> None:
    """A field that this version does not know is no fault."""
    run = RunFolder(tmp_path)
    run.metrics.write_text(json.dumps(asdict(RECORD) | {"gpu_temperature_c": 70}) + "\n")
    assert list(run.read_steps()) == [RECORD]


def test_a_record_without_a_field_is_refused_by_name(tmp_path: Path) -> None:
    """A record that is not a StepRecord is a FormatError that names file and field."""
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(FormatError, match=r"metrics\.jsonl: a StepRecord needs the field loss, got \{'step': 1\}"):
        list(run.read_steps())


@pytest.mark.parametrize("tail", [b'{"step": 3', b'{"step": 3}', b'{"step"\n{"step": 4}\n', b"\xff\xfe\n", b"\x00" * 9])
def test_reading_stops_at_a_damaged_line(tmp_path: Path, tail: bytes) -> None:
    """What a crash left of the last line, and everything after it, is not trusted."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    """Committed checkpoints come oldest first; other folders are not checkpoints."""
    for name in (checkpoint_name(200), checkpoint_name(3), ".incomplete-step-00000004", "abandoned-step-00000009", "x"):
        (tmp_path / name).mkdir()
    assert list(list_checkpoints(tmp_path)) == [3, 200]
    assert list_checkpoints(tmp_path)[3].name == "step-00000003"


def test_reading_a_run_needs_neither_torch_nor_the_training_half() -> None:
    """The report and the tracer read runs in processes that never load torch."""
    code = (
        "import sys, entrenar.runs\nprint([m for m in sys.modules if m == 'torch' or m.startswith('entrenar.train')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

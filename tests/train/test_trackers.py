"""`train.trackers`: each tracker gets the records, continues its run on resume, and can never end a training.

The packages are recording stand-ins with the calls that the real ones have; they were compared once with trackio
0.43.0, wandb 0.31.0 and mlflow 3.17.2, without a network.
"""

import importlib.machinery
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from entrenar.errors import ConfigError
from entrenar.runs import Event, RunFolder, StepRecord
from entrenar.train.metrics import open_journal
from entrenar.train.trackers import Tracker, need_trackers, open_trackers

CONFIG = {"optim": {"lr": 0.1, "long": "x" * 900}, "name": "a"}
RECORD = {
    "step": 3, "loss": 2.0, "lr": 0.1, "eta_s": None, "held_out": {"loss": 1.5}, "phases_s": {"data": 0.1},
}  # fmt: skip
FIGURES = {"train/loss": 2.0, "train/lr": 0.1, "held_out/loss": 1.5}
EVENT = {"step": 4, "kind": "loss_spike", "message": "m"}


class Calls(list[tuple[str, Any]]):
    """What a stand-in was told."""

    def of(self, name: str) -> list[Any]:
        return [values for call, values in self if call == name]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    stand_in = ModuleType(name)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
    stand_in.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, stand_in)


@dataclass(frozen=True)
class Value:
    """A metric or parameter of MLflow."""

    key: str
    value: Any
    timestamp: int = 0
    step: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins for the three packages, and what they are told."""
    told = Calls()
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)

    def begin(**values: Any) -> SimpleNamespace:
        told.append(("init", values))
        print("hello from a tracker")  # noqa: T201  # as trackio does
        return SimpleNamespace(
            log=lambda figures, step=None: told.append(("log", (figures, step))),
            finish=lambda exit_code=None: told.append(("finish", exit_code)),
            define_metric=lambda name, step_metric=None: told.append(("define_metric", (name, step_metric))),
        )

    class MlflowClient:
        def __init__(self, tracking_uri: str) -> None:
            told.append(("client", tracking_uri))

        def get_experiment_by_name(self, _: str) -> SimpleNamespace | None:
            there = "create_experiment" in [call for call, _ in told]
            return SimpleNamespace(experiment_id="7") if there else None

        def create_experiment(self, name: str) -> str:
            told.append(("create_experiment", name))
            return "7"

        def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
            told.append(("create_run", (experiment_id, run_name)))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run_id: str, status: str) -> None:
            told.append(("update_run", (run_id, status)))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            told.append(("log_batch", (run_id, list(metrics), list(params))))

        def set_terminated(self, run_id: str, status: str) -> None:
            told.append(("set_terminated", (run_id, status)))

    module(monkeypatch, "trackio", init=begin)
    module(monkeypatch, "wandb", init=begin, Settings=lambda **values: values)
    module(monkeypatch, "mlflow", MlflowClient=MlflowClient)
    module(monkeypatch, "mlflow.entities", Metric=Value, Param=Value)
    return told


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    return RunFolder(tmp_path / "runs" / "a")


def told_everything(tracker: Tracker) -> None:
    tracker.append(RECORD)
    tracker.append(EVENT)
    tracker.rewind(2)
    tracker.sync()
    tracker.close()


def test_trackio_gets_the_records(calls: Calls, folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Each at its step; a resumed run is found by a name that no other run has; what it prints is no output of ours."""
    for _ in range(2):
        (tracker,) = open_trackers(["trackio"], folder, CONFIG)
        told_everything(tracker)
    first, second = calls.of("init")
    assert first["name"].startswith("a-")
    assert first["name"] == second["name"] == json.loads(folder.trackers.read_text())["trackio"]
    assert (first["project"], first["resume"], first["config"]) == ("entrenar", "allow", CONFIG)
    assert calls.of("log")[:2] == [(FIGURES, 3), ({"events/loss_spike": 1.0}, 4)]
    assert len(calls.of("finish")) == 2
    captured = capsys.readouterr()
    assert (captured.out, "hello" in captured.err) == ("", True)


def test_wandb_stays_in_the_folder_and_draws_over_our_step(
    calls: Calls, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline unless its own variable says otherwise; the same identity on resume; steps may repeat."""
    (tracker,) = open_trackers(["wandb"], folder, CONFIG)
    told_everything(tracker)
    monkeypatch.setenv("WANDB_MODE", "online")
    open_trackers(["wandb"], folder, CONFIG)
    first, second = calls.of("init")
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert first["id"] == second["id"]
    assert (first["dir"], first["name"]) == (str(folder.path), "a")
    assert calls.of("define_metric")[:2] == [("step", None), ("*", "step")]
    assert calls.of("log") == [({"step": 3, **FIGURES}, None), ({"step": 4, "events/loss_spike": 1.0}, None)]


def test_mlflow_gets_batches_and_parameters(calls: Calls, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database next to the runs, one experiment, parameters once and cut to its limits, a run that is continued."""
    config = CONFIG | {"many": {f"option_{number}": number for number in range(120)}}
    (tracker,) = open_trackers(["mlflow"], folder, config)
    parameters = [batch[2] for batch in calls.of("log_batch")]
    assert [len(batch) for batch in parameters] == [100, 23]
    assert parameters[0][:2] == [Value("optim.lr", "0.1"), Value("optim.long", "x" * 500)]
    for _ in range(50):
        tracker.append(RECORD)
    assert [len(metrics) for _, metrics, _ in calls.of("log_batch")] == [0, 0, 150]
    told_everything(tracker)
    _, metrics, _ = calls.of("log_batch")[-1]
    assert [(one.key, one.value, one.step) for one in metrics] == [
        *((key, value, 3) for key, value in FIGURES.items()), ("events/loss_spike", 1.0, 4),
    ]  # fmt: skip
    assert calls.of("set_terminated") == [("r1", "FINISHED")]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    open_trackers(["mlflow"], folder, config)
    assert calls.of("client") == [f"sqlite:///{folder.path.parent.resolve() / 'mlflow.db'}", "http://elsewhere"]
    assert (calls.of("create_experiment"), calls.of("create_run")) == (["entrenar"], [("7", "a")])
    assert calls.of("update_run") == [("r1", "RUNNING")]
    folder.trackers.unlink()
    open_trackers(["mlflow"], folder, CONFIG)
    assert len(calls.of("create_experiment")) == 1


def test_the_journal_tells_trackers_records_and_events_once(calls: Calls, folder: RunFolder) -> None:
    """As it does with the run's own files."""
    trackers = open_trackers(["trackio"], folder, CONFIG)
    journal = open_journal(folder, lambda _: None, lambda _: None, trackers, after_step=0, is_on_board=False)
    journal.record(StepRecord(**{field: RECORD.get(field, 1.0) for field in StepRecord.__dataclass_fields__}))
    journal.tell(Event(**EVENT))
    journal.rewind(2)
    journal.close()
    assert [step for _, step in calls.of("log")] == [3, 4]
    assert len(calls.of("finish")) == 1


def test_a_run_that_an_error_ended_has_failed(calls: Calls, folder: RunFolder) -> None:
    """Where a tracker knows that."""
    trackers = open_trackers(["mlflow", "wandb", "trackio"], folder, CONFIG)
    journal = open_journal(folder, lambda _: None, lambda _: None, trackers, after_step=0, is_on_board=False)
    journal.mark_failed()
    journal.close()
    assert calls.of("set_terminated") == [("r1", "FAILED")]
    assert calls.of("finish") == [1, None]


def test_a_tracker_that_fails_is_dropped_with_a_message(
    calls: Calls, folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises, once; training does not notice."""
    (tracker,) = open_trackers(["trackio"], folder, CONFIG)
    with caplog.at_level(logging.ERROR):
        tracker.append({"loss": 1.0})
        told_everything(tracker)
    assert [record.getMessage() for record in caplog.records] == [
        "trackio failed and gets nothing more of this run: 'step'"
    ]
    assert calls.of("log") == []


def test_a_tracker_that_cannot_begin_is_refused(
    calls: Calls, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason, and where its run is remembered with the way to another one."""

    def fail(**values: Any) -> None:
        raise RuntimeError("no account")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(ConfigError, match=r"trackers = wandb could not begin: no account; see to it or leave it out$"):
        open_trackers(["trackio", "wandb"], folder, CONFIG)
    assert len(calls.of("finish")) == 1, "the one that had begun is ended"
    assert not folder.trackers.exists()
    folder.trackers.write_text('{"wandb": "abc"}')
    with pytest.raises(ConfigError, match=r"or delete .*trackers.json to begin another run in it"):
        open_trackers(["wandb"], folder, CONFIG)


@pytest.mark.parametrize("content", ["{", "[]", '"a"'])
def test_a_damaged_memory_begins_another_run(calls: Calls, folder: RunFolder, content: str) -> None:
    """It is not worth a stop."""
    folder.trackers.write_text(content)
    open_trackers(["mlflow"], folder, CONFIG)
    assert json.loads(folder.trackers.read_text()) == {"mlflow": "r1"}


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without importing anything; no trackers need nothing."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"trackers = {name} needs the {name} package; pip install 'entrenar\[{name}"
    ):
        need_trackers([name])
    need_trackers([])


def test_no_trackers_leave_no_file(folder: RunFolder) -> None:
    """And open nothing."""
    assert open_trackers([], folder, CONFIG) == []
    assert not folder.trackers.exists()

"""Experiment trackers as sinks: the records of a run in trackio, Weights & Biases or MLflow too.

The run's own files stay the record. A tracker gets each number of a record at its step, and each event as a 1; it is
told everything once, so steps that are taken again after a resume or a rewind appear twice. Nothing leaves the machine
unless the tracker's own environment variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`) say so. A tracker that fails while
the run trains is dropped with a message: no run ends because a chart is missing.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from entrenar.errors import ConfigError, FormatError
from entrenar.files import atomic_write, read_json
from entrenar.runs import RunFolder

_log = logging.getLogger(__name__)

TrackerName = Literal["trackio", "wandb", "mlflow"]

_PROJECT = "entrenar"
_BUFFERED = 50  # records in one transaction of MLflow
_MOST_PARAMETERS, _LONGEST_PARAMETER = 100, 500


class Client(Protocol):
    """One tracker's run."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures at a step."""

    def flush(self) -> None:
        """Hand over what is pending."""

    def close(self, *, is_failed: bool) -> None:
        """Hand over what is pending, and end the run."""


def need_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises: ConfigError.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers = {name} needs the {name} package; pip install 'entrenar[{name}]'")


class Tracker:
    """A sink for the records of a run."""

    def __init__(self, name: str, client: Client) -> None:
        self._name, self._client = name, client
        self._is_dropped = self._is_failed = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a step's record, or an event."""
        self._try(lambda: self._client.log(record["step"], dict(_figures(record))))

    def rewind(self, step: int) -> None:
        """Leave what is logged: trackers only add, and the steps taken again are added to it."""

    def sync(self) -> None:
        """Hand over what is pending."""
        self._try(self._client.flush)

    def mark_failed(self) -> None:
        """Let the tracker's run end as one that failed."""
        self._is_failed = True

    def close(self) -> None:
        """End the tracker's run."""
        self._try(lambda: self._client.close(is_failed=self._is_failed))

    def _try(self, action: Callable[[], None]) -> None:
        if self._is_dropped:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001  # a tracker may raise anything, and training must not notice
            self._is_dropped = True
            _log.error("%s failed and gets nothing more of this run: %s", self._name, error)  # a line


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "kind" in record:
        yield f"events/{record['kind']}", 1.0
        return
    for name, value in record.items():
        if name == "held_out" and value:
            yield from ((f"held_out/{figure}", float(number)) for figure, number in value.items())
        elif name != "step" and isinstance(value, int | float):
            yield f"train/{name}", float(value)


def open_trackers(names: Sequence[str], folder: RunFolder, config: Mapping[str, Any]) -> list[Tracker]:
    """Begin a run in each tracker, or continue the one that the run's folder remembers.

    Raises: ConfigError for a tracker that is not installed or cannot begin; DiskFullError, MachineError.
    """
    need_trackers(names)
    known = _remembered(folder)
    opened: list[Tracker] = []
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what they print is no output of the command
                client, identity = _OPENERS[name](folder, config, known.get(name))
        except Exception as error:
            for begun in opened:
                begun.close()
            raise ConfigError(
                f"trackers = {name} could not begin: {error}; see to it or leave it out"
                + (f", or delete {folder.trackers} to begin another run in it" if name in known else "")
            ) from error
        known[name] = identity
        opened.append(Tracker(name, client))
    if opened:
        atomic_write(folder.trackers, json.dumps(known, indent=1) + "\n")
    return opened


def _remembered(folder: RunFolder) -> dict[str, str]:
    try:
        return {str(name): str(identity) for name, identity in read_json(folder.trackers).items()}
    except (OSError, FormatError, AttributeError):
        return {}


class _Trackio:
    """A run of trackio, which keeps its projects in one folder of the user, or where TRACKIO_DIR says."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def flush(self) -> None:
        """Nothing: trackio writes in a thread."""

    def close(self, *, is_failed: bool) -> None:  # noqa: ARG002  # trackio has no word for it
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _open_trackio(folder: RunFolder, config: Mapping[str, Any], known: str | None) -> tuple[Client, str]:
    trackio = importlib.import_module("trackio")
    # A run is found again by its name alone, and another run of this name may be in the project.
    name = known or f"{folder.path.name}-{uuid.uuid4().hex[:6]}"
    run = trackio.init(
        project=_PROJECT, name=name, config=dict(config), resume="allow", embed=False, auto_log_gpu=False,
        auto_log_cpu=False,
    )  # fmt: skip
    return _Trackio(run), name


class _Wandb:
    """A run of Weights & Biases, in the run's folder until `wandb sync` sends it."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # Its own step may never fall, so a resumed run would be refused; ours is a figure that charts are drawn over.
        self._run.log({"step": step, **figures})

    def flush(self) -> None:
        """Nothing: a process of its own writes."""

    def close(self, *, is_failed: bool) -> None:
        self._run.finish(exit_code=int(is_failed))


def _open_wandb(folder: RunFolder, config: Mapping[str, Any], known: str | None) -> tuple[Client, str]:
    wandb = importlib.import_module("wandb")
    identity = known or uuid.uuid4().hex[:8]
    run = wandb.init(
        project=_PROJECT, name=folder.path.name, id=identity, dir=str(folder.path), resume="allow", config=dict(config),
        mode=os.environ.get("WANDB_MODE", "offline"), settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return _Wandb(run), identity


class _Mlflow:
    """A run of MLflow, in a database next to the runs, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._pending: list[Any] = []
        self._num_records = 0

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self._pending += [self._metric(name, value, now_ms, step) for name, value in figures.items()]
        self._num_records += 1
        if self._num_records >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._client.log_batch(self._run_id, metrics=self._pending)
        self._pending, self._num_records = [], 0

    def close(self, *, is_failed: bool) -> None:
        self.flush()
        self._client.set_terminated(self._run_id, status="FAILED" if is_failed else "FINISHED")


def _open_mlflow(folder: RunFolder, config: Mapping[str, Any], known: str | None) -> tuple[Client, str]:
    mlflow = importlib.import_module("mlflow")
    database = (folder.path.parent / "mlflow.db").resolve()
    client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{database}"))
    if known is not None:
        client.update_run(known, status="RUNNING")
        return _Mlflow(client, known), known
    experiment = client.get_experiment_by_name(_PROJECT)
    experiment_id = client.create_experiment(_PROJECT) if experiment is None else experiment.experiment_id
    run_id = str(client.create_run(experiment_id, run_name=folder.path.name).info.run_id)
    parameter = importlib.import_module("mlflow.entities").Param
    parameters = [parameter(key, str(value)[:_LONGEST_PARAMETER]) for key, value in _flat(config)]
    for first in range(0, len(parameters), _MOST_PARAMETERS):
        client.log_batch(run_id, params=parameters[first : first + _MOST_PARAMETERS])
    return _Mlflow(client, run_id), run_id


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


_Opener = Callable[[RunFolder, Mapping[str, Any], str | None], tuple[Client, str]]
_OPENERS: Mapping[str, _Opener] = {"trackio": _open_trackio, "wandb": _open_wandb, "mlflow": _open_mlflow}

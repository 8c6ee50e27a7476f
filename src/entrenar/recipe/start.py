"""Begin a run: what pre-training and fine-tuning have in common, in the order in which it happens.

    start -> check_unchanged -> run_folder -> put_into_training -> carry_out

Nothing is written before `run_folder`: a fault in a new run must not cost the old one. From there to its end the run
holds a lock on its folder.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic

import torch
from torch import nn

from entrenar import scale
from entrenar.config import AnyConfig, ConfigT, changeable, fixed
from entrenar.config_file import to_toml
from entrenar.data import Batch, Progress, Tokenizer
from entrenar.errors import CheckpointError, ConfigError
from entrenar.files import atomic_write, explained_disk_errors
from entrenar.locks import check_free, held
from entrenar.model import Llama
from entrenar.planning import settle_compute_dtype
from entrenar.recipe.sessions import recorded_session
from entrenar.runs import Event, RunFolder, StepRecord, list_checkpoints
from entrenar.scale import check_same, check_shared, current_world, rank_log, watched, weight_hashes
from entrenar.train import (
    Checkpoint,
    Outcome,
    Run,
    Settings,
    Task,
    World,
    check_same_config,
    figures_of_next_step,
    fit,
    latest_good,
    load,
    prepare_process,
)
from entrenar.train.metrics import need_tensorboard
from entrenar.train.progress import StepFigures
from entrenar.train.replay import Bundle
from entrenar.train.trackers import need_trackers
from entrenar.version import __version__


@dataclass(frozen=True)
class Observer:
    """Callbacks for progress; the command line prints their arguments.

    `on_look` sees the model at each held-out evaluation, including the one before the first step; the figures that it
    returns join the evaluation's. `on_model` gets the module that the loop is about to train. `inspect_code` describes
    the code that trains, before the first step and at each checkpoint, and may stop the run (see `train.Run`).
    """

    on_stage: Callable[[str], None] = lambda _: None
    on_record: Callable[[StepRecord], None] = lambda _: None
    on_event: Callable[[Event], None] = lambda _: None
    on_prepare: Callable[[Progress], None] = lambda _: None
    on_look: Callable[[Llama, Tokenizer], Mapping[str, float]] = lambda *_: {}
    on_model: Callable[[nn.Module], None] = lambda _: None
    inspect_code: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Mode:
    """The way a run begins: new, resumed, or over an earlier run of its name.

    Attributes:
        resume: continue the latest good checkpoint.
        overwrite: delete an earlier run of the same name first.
        allow_changes: resume although the config changed.
        adds_time: a resumed run's max_time_s counts from its checkpoint, not from its first step.
        replay: take the step of this bundle again, write nothing, and raise StepTaken.
    """

    resume: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    adds_time: bool = False
    replay: Path | None = None


class StepTaken(Exception):
    """The step of a bundle was taken again: its figures, and the hashes of its batches."""

    def __init__(self, figures: StepFigures, batches: tuple[str, ...]) -> None:
        super().__init__()
        self.figures, self.batches = figures, batches


@dataclass(frozen=True)
class Start(Generic[ConfigT]):
    """A run that can begin: its process is set up, its device is there, and its folder is free or to be resumed.

    `world` is this process among the ranks that train together.
    """

    config: ConfigT
    mode: Mode
    device: torch.device
    checkpoint: Checkpoint | None
    world: World

    @property
    def is_resumed(self) -> bool:
        """Return whether the run continues from a checkpoint."""
        return self.checkpoint is not None

    @property
    def position(self) -> dict[str, Any] | None:
        """The loader's position in the checkpoint, if there is one."""
        return self.checkpoint.loader_state if self.checkpoint else None


def start(config: ConfigT, mode: Mode) -> Start[ConfigT]:
    """Set up the process and find the device and the checkpoint; the compute dtype is settled in the config returned.

    Raises:
        ConfigError, CheckpointError: the machine lacks the device or a package, or the folder is not free, or cannot be
            resumed.
        MachineError: another process trains there.
    """
    if config.train.tensorboard:
        need_tensorboard()
    need_trackers(config.train.trackers)
    prepare_process(config.train)
    device, world = choose_device(config), current_world()
    if world.size > 1 and device.type != "cpu":
        raise ConfigError(f'device must be cpu for several ranks, got {device}; set device = "cpu"')
    if world.size > 1 and config.train.grace_s is not None:
        raise ConfigError("train.grace_s must be left out for several ranks: one rank cannot give up a step alone")
    if world.is_writer and mode.replay is None:
        check_free(RunFolder(config.run_dir).lock, str(config.run_dir))
    checkpoint = find_checkpoint(config.run_dir, mode)
    _check_same_start(world, config, mode, checkpoint)
    recorded = checkpoint.state["config"] if checkpoint else None
    if mode.adds_time and checkpoint is not None:
        config = _with_more_time(config, checkpoint.state["counters"]["elapsed_s"])
    config = settle_compute_dtype(config, device, recorded)
    if world.size > 1:  # another rank may have measured another dtype as the fastest
        optim = config.optim.model_copy(update={"muon_dtype": world.broadcast(config.optim.muon_dtype)})
        config = config.model_copy(update={"compute_dtype": world.broadcast(config.compute_dtype), "optim": optim})
    return Start(config, mode, device, checkpoint, world)


def _check_same_start(world: World, config: AnyConfig, mode: Mode, checkpoint: Checkpoint | None) -> None:
    check_same(
        world,
        {
            "version": {"entrenar": __version__, "torch": torch.__version__},
            "config": _recorded(config),
            "mode": asdict(mode),
            "resumed step": checkpoint.step if checkpoint else None,
        },
    )


def _with_more_time(config: ConfigT, elapsed_s: float) -> ConfigT:
    limit_s = config.train.max_time_s
    if limit_s is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"max_time_s": elapsed_s + limit_s})})


def choose_device(config: AnyConfig) -> torch.device:
    """Return the device that the config names, or the best one.

    Raises:
        ConfigError: the machine has no such device.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device must be one that this machine has, got cuda; set device = "cpu" or "auto"')
    return torch.device(config.device)


def find_checkpoint(run_dir: Path, mode: Mode) -> Checkpoint | None:
    """Return the checkpoint to resume from; None for a new run if its folder is free or may be cleared.

    Raises:
        CheckpointError: no run to resume, or no good checkpoint in it.
        ConfigError: a run of that name exists already, or both modes are asked for.
    """
    if mode.replay is not None:
        return _checkpoint_of(Bundle.read(mode.replay), run_dir)
    checkpoints = RunFolder(run_dir).checkpoints
    if mode.resume and mode.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; leave one out")
    if mode.resume:
        if not run_dir.is_dir():
            raise CheckpointError(f"no run to resume at {run_dir}; start it without --resume")
        return latest_good(checkpoints)
    if list_checkpoints(checkpoints) and not mode.overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another --name"
        )
    return None


def _checkpoint_of(bundle: Bundle, run_dir: Path) -> Checkpoint | None:
    """Return the checkpoint before a bundle's step, at the bundle's place in the data."""
    if bundle.checkpoint is None:
        return None
    found = load(run_dir / bundle.checkpoint)
    return replace(found, state={**found.state, "loader": bundle.before})


def check_unchanged(started: Start[ConfigT]) -> None:
    """Check that the config of a resumed run has not changed in any setting that affects a step's result.

    Raises:
        CheckpointError: it has another, and that is not allowed, or the checkpoint holds other tensors.
    """
    if started.checkpoint is None:
        return
    config = started.config
    check_same_config(
        started.checkpoint.state["config"],
        _recorded(config),
        may_differ=changeable(type(config)),
        fixed=fixed(type(config)),
        is_change_allowed=started.mode.allow_changes,
    )


@contextmanager
def run_folder(started: Start[ConfigT], kept: str = "") -> Iterator[None]:
    """Make the run's folder, write the config into it and hold it; in mode overwrite, delete earlier content.

    Files whose name ends in `kept` stay. Enter it once everything else has been checked. Of several ranks the writer
    alone touches the folder, and every other one gets a log in it.

    Raises:
        ConfigError: the ranks do not share the folder.
        DiskFullError, MachineError: among them that another process trains there.
    """
    if started.mode.replay is not None:
        yield
        return
    world, run_dir = started.world, started.config.run_dir
    with _made_and_held(started, kept) if world.is_writer else nullcontext():
        check_same(world, {"config": _recorded(started.config)})  # the writer has made the folder
        check_shared(world, run_dir)
        if not world.is_writer:
            logging.getLogger("entrenar").addHandler(rank_log(run_dir, world.rank))
        with watched(run_dir, started.config.train.rank_timeout_s):
            yield


@contextmanager
def _made_and_held(started: Start[ConfigT], kept: str) -> Iterator[None]:
    run = RunFolder(started.config.run_dir)
    with explained_disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with held(run.lock, str(run.path)):
        if not started.is_resumed:
            find_checkpoint(run.path, started.mode)  # another process may have trained there meanwhile
        if started.mode.overwrite:
            with explained_disk_errors(run.path):
                _clear(run, kept)
        atomic_write(run.config, to_toml(started.config))
        with recorded_session(run, started.device, started.world):
            yield


def _clear(run: RunFolder, kept: str) -> None:
    for old in run.path.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old != run.lock and not (kept and old.name.endswith(kept)):
            old.unlink()


def put_into_training(started: Start[ConfigT], model: Llama, observer: Observer) -> Start[ConfigT]:
    """Switch the model to training mode, with the memory savers that the config asks for, and spread it over the ranks.

    Returns: the start, whose world knows of the pieces if the weights were cut.

    Raises:
        ConfigError: the base is to be streamed and is not mapped from a file, the ranks differ in a weight, or the
            weights cannot be cut as asked.
    """
    config, world = started.config, started.world
    model.train()
    model.checkpointing = config.train.checkpointing
    if config.train.stream_base:
        model.stream_base()
    if world.size == 1:
        return started
    # What a resumed run trains comes from the checkpoint, and has no values yet.
    check_same(world, {"weights": weight_hashes(model, only_frozen=started.is_resumed)})
    world = scale.shard(model, config.scale, world, config.train, config.optim)
    if world.pieces is not None:
        copies = f", {world.pieces.copies} copies" if world.pieces.copies > 1 else ""
        observer.on_stage(f"Weights in pieces over {world.size // world.pieces.copies} ranks{copies}")
    return replace(started, world=world)


def carry_out(started: Start[ConfigT], task: Task[Batch], observer: Observer) -> Outcome:
    """Run the training loop and leave the model in evaluation mode.

    Raises:
        TrainingHalted, CheckpointError, MachineError: see `train.fit`.
    """
    config = started.config
    settings = Settings(config.train, config.optim, config.schedule, config.checkpoint, config.monitor)
    observer.on_stage("Resuming" if started.is_resumed else "Training")
    observer.on_model(task.module)
    run = Run(config.run_dir, _recorded(config), started.checkpoint, observer.inspect_code)
    if started.mode.replay is not None:
        with TemporaryDirectory() as elsewhere:
            raise StepTaken(*figures_of_next_step(task, settings, replace(run, folder=Path(elsewhere))))
    outcome = fit(task, settings, run, started.world, on_record=observer.on_record, on_event=observer.on_event)
    started.world.any(flag=False)  # wait until the writer has saved: the last checkpoint is the result of every rank
    task.module.eval()
    return outcome


def _recorded(config: AnyConfig) -> dict[str, Any]:
    """Return the config as checkpoints remember it."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"preset"})
    return values

from entrenar.train.allocator import keep_freed_memory, return_freed_blocks
from entrenar.train.checkpoint import (
    Checkpoint,
    check_same_config,
    git_revision,
    latest_good,
    load,
    verify,
)
from entrenar.train.loop import Outcome, figures_of_next_step, fit
from entrenar.train.monitor import MonitorConfig
from entrenar.train.oom import is_oom
from entrenar.train.optim import Optimizer, build_optimizer
from entrenar.train.process import keeps_freed_memory, prepare_process
from entrenar.train.rng import seed_all
from entrenar.train.schedule import ScheduleConfig, lr_multiplier
from entrenar.train.settings import CheckpointConfig, OptimConfig, Settings, TrainConfig
from entrenar.train.task import Position, Run, SplittableBatch, Task
from entrenar.train.world import World

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "MonitorConfig",
    "OptimConfig",
    "Optimizer",
    "Outcome",
    "Position",
    "Run",
    "ScheduleConfig",
    "Settings",
    "SplittableBatch",
    "Task",
    "TrainConfig",
    "World",
    "build_optimizer",
    "check_same_config",
    "figures_of_next_step",
    "fit",
    "git_revision",
    "is_oom",
    "keep_freed_memory",
    "keeps_freed_memory",
    "latest_good",
    "load",
    "lr_multiplier",
    "prepare_process",
    "return_freed_blocks",
    "seed_all",
    "verify",
]

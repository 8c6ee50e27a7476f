"""The settings of the training loop.

`Settings` puts the config models of this package side by side. Their field names are unique across the project,
because each field is also a command-line flag.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from entrenar.errors import ConfigError
from entrenar.runs import CHANGEABLE, FIXED
from entrenar.train.monitor import MonitorConfig
from entrenar.train.schedule import ScheduleConfig
from entrenar.train.trackers import TrackerName


class OptimConfig(BaseModel):
    """The optimizer and its hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(default="adamw", json_schema_extra=FIXED)
    """`adamw8bit` keeps moments in eight bits; `muon` updates the hidden matrices and leaves embeddings, head and
    norms to AdamW."""
    lr: float = Field(default=3e-4, gt=0.0)
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay of parameters with two or more dimensions."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW: decay of the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW: decay of the running mean of the squared gradient."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW: term added to the denominator."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest norm of the whole gradient; a larger one is scaled down to it. 0 turns clipping off."""
    muon_momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Muon: decay of the momentum."""
    muon_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Muon: the dtype of its products; `auto` takes what multiplies fastest here, and a resumed run keeps it."""
    muon_excluded: tuple[str, ...] = Field(default=("embed_tokens", "lm_head"), json_schema_extra=FIXED)
    """Muon: matrices whose name contains one of these are left to AdamW."""


class TrainConfig(BaseModel):
    """Length, precision and resources of a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    max_steps: int | None = Field(default=None, ge=1, json_schema_extra=CHANGEABLE)
    """Stop after this many optimizer steps."""
    epochs: float | None = Field(default=None, gt=0.0, json_schema_extra=CHANGEABLE)
    """Stop after this many passes over the corpus."""
    max_time_s: float | None = Field(default=None, gt=0.0, json_schema_extra=CHANGEABLE)
    """Stop after this many seconds, including evaluation and checkpoints; with no other limit the schedule follows the
    clock."""
    grace_s: float | None = Field(default=None, gt=0.0, json_schema_extra=CHANGEABLE)
    """Seconds from a stop signal to the kill that follows: a step that is not over in time is given up, and the one
    before it saved; when not given, the step is finished first."""
    rank_timeout_s: float = Field(default=600.0, ge=1.0, le=1e6, json_schema_extra=CHANGEABLE)
    """Several ranks: seconds that a rank waits for the others before the run ends and names those that did not come."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step."""
    eval_every: int = Field(default=100, ge=0, json_schema_extra=CHANGEABLE)
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    early_stop_patience: int | None = Field(default=None, ge=1, json_schema_extra=CHANGEABLE)
    """Stop after this many evaluations in a row without a new best held-out loss."""
    log_every: int = Field(default=1, ge=1, json_schema_extra=CHANGEABLE)
    """Steps between metrics records."""
    tensorboard: bool = Field(default=False, json_schema_extra=CHANGEABLE)
    """Also write TensorBoard event files into the run folder."""
    trackers: tuple[TrackerName, ...] = Field(default=(), json_schema_extra=CHANGEABLE)
    """Experiment trackers that get the records too; each is an extra and stays on this machine unless its own
    environment variables say otherwise."""
    seed: int = Field(default=0, ge=0, lt=1 << 63, json_schema_extra=FIXED)
    """Seed of weights, shuffling and dropout."""
    precision: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=FIXED)
    """`bfloat16` halves weights, gradients and activations and keeps float32 masters in the optimizer."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass instead of keeping them in memory."""
    stream_base: bool = Field(default=False, json_schema_extra=CHANGEABLE)
    """Keep only the frozen layers in use in memory; the base must be mapped from its folder."""
    offload: Literal["none", "host", "disk"] = Field(default="none", json_schema_extra=CHANGEABLE)
    """Where activations wait for the backward pass: in place, in host memory (for a GPU), or in a file."""
    offload_dir: Path | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Folder for the file of activations; by default the run's folder."""
    offload_budget_gb: float = Field(default=20.0, gt=0.0, json_schema_extra=CHANGEABLE)
    """Largest size of that file."""
    freed_memory: Literal["keep", "return"] = Field(default="keep", json_schema_extra=CHANGEABLE)
    """Keep the memory that a step frees for the next step, or return it, for a lower peak and slower steps;
    `offload = disk` implies the latter."""
    threads: int | None = Field(default=None, ge=1, le=1024, json_schema_extra=CHANGEABLE)
    """CPU threads per operation; by default torch decides."""

    @property
    def offload_bytes(self) -> int:
        """The most that the file of offloaded activations takes on the disk."""
        return int(self.offload_budget_gb * 1e9) if self.offload == "disk" else 0

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.max_steps is None and self.epochs is None and self.max_time_s is None:
            raise ValueError("a run needs an end: set max_steps, epochs or max_time_s")
        return self

    def total_steps(self, micro_batches_per_epoch: int | None) -> int | None:
        """Return the number of steps until the first limit; None when only time limits the run.

        Raises: ConfigError when `epochs` is set and the length of an epoch is not known.
        """
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            if micro_batches_per_epoch is None:
                raise ConfigError("epochs needs a corpus of known length; set max_steps instead")
            limits.append(math.ceil(self.epochs * micro_batches_per_epoch / self.grad_accum_steps))
        return min(limits, default=None)


class CheckpointConfig(BaseModel):
    """When to save checkpoints, and which to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    save_every: int = Field(default=500, ge=0, json_schema_extra=CHANGEABLE)
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = Field(default=2, ge=1, json_schema_extra=CHANGEABLE)
    """Number of newest checkpoints to keep."""
    keep_best: bool = Field(default=True, json_schema_extra=CHANGEABLE)
    """Also keep the checkpoint with the lowest held-out loss; each save then evaluates first."""


@dataclass(frozen=True)
class Settings:
    """The config models of a training run."""

    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

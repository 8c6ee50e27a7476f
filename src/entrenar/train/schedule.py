"""The learning rate as a function of the step, and of nothing else.

A schedule without state cannot be resumed wrongly: `lr_multiplier` is pure, needs no torch, and is 1 at its highest.

    step           1 ... warm-up | stable (wsd only) | decay ............ | total
    multiplier     k / warm-up   | 1                 | 1 -> min_lr_ratio  | min_lr_ratio

The last step runs at exactly `min_lr_ratio`. Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983. Warm-up, stable,
decay: Hu et al. 2024 (MiniCPM), arXiv:2404.06395.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ScheduleConfig(BaseModel):
    """The learning rate over the course of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` stays at the peak and decays linearly at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate climbs linearly to its peak."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Rate of the last step, as a fraction of the peak."""
    wsd_decay_ratio: float = Field(default=0.2, gt=0.0, le=1.0)
    """Fraction of the steps after the warm-up in which `wsd` decays."""


def lr_multiplier(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the fraction of the peak learning rate in `step`, counted from 1, of `total_steps`.

    Steps past the end keep the final value.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = _progress(step, max(config.warmup_steps, 1), total_steps)
    if config.schedule == "wsd":
        progress = max(0.0, 1.0 - (1.0 - progress) / config.wsd_decay_ratio)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


def _progress(step: int, first: int, last: int) -> float:
    """Return 0 at step `first`, the first of the full rate, and 1 from step `last` on."""
    if last <= first:
        return float(step > first)
    return min(max((step - first) / (last - first), 0.0), 1.0)

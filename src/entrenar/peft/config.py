"""Define an adapter's settings, with PEFT's names wherever PEFT has one, so that its folders and ours agree.

Scale of a module of rank r: alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(r), which keeps the update's
size as r grows (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
"""

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from entrenar.peft.patterns import matches
from entrenar.runs import FIXED

LoraInit = Literal["default", "gaussian", "pissa", "loftq"]

_MOST_ALPHA = 1e6  # far past any use, and far from what float32 cannot multiply by
_TOP_LAYERS = re.compile(r"top:([1-9]\d*)")


class LoraConfig(BaseModel):
    """Which projections get a low-rank adapter, of what rank and strength."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rank: int = Field(default=8, gt=0, le=1 << 20, json_schema_extra=FIXED)
    """Rank of the adapters, at most the smaller width of their projection."""
    lora_alpha: float = Field(default=16.0, gt=0, le=_MOST_ALPHA, allow_inf_nan=False)
    """Strength: the update is multiplied by lora_alpha / rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of an input to be dropped from the adapter's branch in training."""
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1, json_schema_extra=FIXED)
    """Projections that get an adapter, by the end of their names."""
    layers: Literal["all"] | str | tuple[int, ...] = Field(default="all", json_schema_extra=FIXED)
    """Layers that get adapters: all, top:K for the last K, or a list of numbers from 0."""
    rank_pattern: dict[str, int] = Field(default_factory=dict, json_schema_extra=FIXED)
    """Another rank for the modules whose name ends in a match of the key, a regular expression."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another lora_alpha, by the same kind of key."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(rank) instead."""
    use_dora: bool = Field(default=False, json_schema_extra=FIXED)
    """Train each output's magnitude apart from its direction."""
    lora_init: LoraInit = "default"
    """First values. default: A uniform, B zero; gaussian: A normal / rank; pissa: the weight's main directions; loftq
    (qlora): those of what quantizing took away."""
    lora_plus_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Learning rate of B as a multiple of A's."""
    modules_to_save: tuple[str, ...] = Field(default=(), json_schema_extra=FIXED)
    """Modules outside the layers to train in full and keep with the adapter, such as embed_tokens and lm_head."""

    @field_validator("layers")
    @classmethod
    def _layers_are_readable(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str):
            if value != "all" and not _TOP_LAYERS.fullmatch(value):
                raise ValueError(f"layers must be all, top:K with K > 0, or a list of numbers, got {value!r}")
        elif not value or min(value) < 0:
            raise ValueError(f"layers must name at least one layer, counted from 0, got {list(value)}")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_usable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern, number in value.items():
            if not 0 < number <= _MOST_ALPHA:  # nor NaN
                raise ValueError(f"the value for {pattern!r} must be > 0 and <= {_MOST_ALPHA:g}, got {number}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    def layer_numbers(self, num_layers: int) -> set[int]:
        """Return the layers that `layers` means in a model of `num_layers`; larger numbers are returned unchanged."""
        if isinstance(self.layers, tuple):
            return set(self.layers)
        top = _TOP_LAYERS.fullmatch(self.layers)
        first = 0 if top is None else num_layers - int(top[1])
        return set(range(first, num_layers))

    def rank_of(self, module_name: str) -> int:
        """Return the rank of one module's adapter."""
        return self.rank_pattern.get(matching_key(self.rank_pattern, module_name), self.rank)

    def scale_of(self, module_name: str) -> float:
        """Return what one module's B A is multiplied by."""
        alpha = self.alpha_pattern.get(matching_key(self.alpha_pattern, module_name), self.lora_alpha)
        rank = self.rank_of(module_name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def matching_key(pattern: dict[str, int] | dict[str, float], module_name: str) -> str:
    """Return the first key that matches the end of a module's name by whole parts, or "" (PEFT's rule)."""
    return next((key for key in pattern if matches(key, module_name)), "")

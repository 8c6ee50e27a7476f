"""Define the settings for several ranks."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from entrenar.runs import CHANGEABLE

Shard = Literal["auto", "none", "full", "hybrid"]


class ScaleConfig(BaseModel):
    """How a model is spread over ranks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    shard: Shard = Field(default="auto", json_schema_extra=CHANGEABLE)
    """Several ranks: `none` gives each rank all weights and moments, `full` a piece of each (FSDP2), `hybrid` cuts them
    within groups of `shard_size` ranks (HSDP); `auto` cuts what would take more than half of the memory whole."""
    shard_size: int | None = Field(default=None, ge=2, json_schema_extra=CHANGEABLE)
    """Ranks that hold one copy of the model together."""

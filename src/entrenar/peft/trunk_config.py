"""The settings of the trunk cache."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from entrenar.runs import CHANGEABLE


class TrunkConfig(BaseModel):
    """Settings for caching the states of the frozen lower layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cache_trunk: bool = False
    """Compute the frozen layers below the lowest adapter once and read them from disk in later epochs."""
    trunk_dir: Path = Field(default=Path("trunk-cache"), json_schema_extra=CHANGEABLE)
    """Folder of the cache; runs over the same base and data share it, one at a time."""
    trunk_rows: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """How the states are kept: bfloat16 takes 2 bytes a number, int8 little more than 1."""
    trunk_budget_gb: float = Field(default=20.0, gt=0, json_schema_extra=CHANGEABLE)
    """Most disk space the cache may take, in 10^9 bytes."""
    trunk_checks: int = Field(default=3, ge=0, json_schema_extra=CHANGEABLE)
    """Batches read from disk that are computed the long way too and compared."""

    @property
    def cache_bytes(self) -> int:
        """The most that the cache takes on the disk."""
        return int(self.trunk_budget_gb * 1e9) if self.cache_trunk else 0

"""Which base weights are quantized, and how.

The projections of the layers become NF4 (Dettmers et al. 2023, arXiv:2305.14314). Embedding and head decide single
tokens and are kept by default; in a small model they are half of the base, and int8 by row or NF4 takes most of that
away.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from entrenar.errors import ConfigError

Kind = Literal["keep", "int8", "nf4"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class QuantizeConfig(BaseModel):
    """Settings for storing a frozen base while adapters train on top (method = qlora)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    embedding: Kind = "keep"
    """The embedding: as stored (keep), in 8 bits with a scale for each row (int8), or in four bits (nf4)."""
    head: Kind | None = None
    """The head, if it is not the embedding itself: the same choices; by default, the embedding's."""
    bits: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Budget of bits a weight, everything included: each matrix gets 2 to 8, and the run keeps the rounded base."""
    calibration: Path | None = None
    """A text typical of the model's use, to choose widths and round by; by default, text that the model writes."""

    loftq_turns: int = Field(default=5, ge=1)
    """With bits and lora_init = loftq: rounds of fitting codes and adapter to each other; more is better, slowly."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.bits is not None and (self.embedding != "keep" or self.head is not None):
            raise ValueError("bits chooses a width for embedding and head too; leave embedding and head out, or bits")
        if self.calibration is not None and self.bits is None:
            raise ValueError("calibration has no effect without bits; give a budget, or leave it out")
        if self.loftq_turns != type(self).model_fields["loftq_turns"].default and self.bits is None:
            raise ValueError("loftq_turns has no effect without bits; give a budget, or leave it out")
        return self

    def kind_of(self, name: str) -> Kind:
        """Return how to hold a plain weight; every projection is NF4."""
        if name.endswith("_proj.weight"):
            return "nf4"
        if name == EMBEDDING:
            return self.embedding
        return (self.head or self.embedding) if name == HEAD else "keep"

    def check_tied(self, *, is_tied: bool) -> None:
        """Check that a tied head is not to be held in another kind than its embedding.

        Raises:
            ConfigError.
        """
        if is_tied and self.head not in (None, self.embedding):
            raise ConfigError(
                f"quantize.head must be left out for this model, whose head is its embedding, got {self.head} "
                f"beside embedding = {self.embedding}"
            )

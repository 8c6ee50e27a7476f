"""Define the settings for a run's data."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from entrenar.runs import CHANGEABLE, FIXED


class DataConfig(BaseModel):
    """Where the tokens come from and how they are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    corpus: tuple[Path, ...] = Field(default=(Path("corpora/stdlib"),), min_length=1)
    """Prepared corpora to train on, folders made by `entrenar prepare`."""
    weights: tuple[float, ...] | None = Field(default=None, json_schema_extra=FIXED)
    """How often each corpus is drawn from; by its number of tokens when not given."""
    sources: tuple[str, ...] = ()
    """What to prepare the corpus from if its folder does not exist; `stdlib` is Python's own sources."""
    tokenizer: Path | None = None
    """Tokenizer for `sources`: tokenizer.json, a sentencepiece .model or a model folder; trained when not given."""
    batch_size: int = Field(default=8, ge=1, le=1 << 20)
    """Windows in one micro-batch."""
    seq_len: int = Field(default=256, ge=1, le=1 << 31, json_schema_extra=FIXED)
    """Tokens in a window."""
    mask_documents: bool = True
    """Keep documents that share a window from seeing each other."""
    max_eval_batches: int | None = Field(default=None, ge=1, json_schema_extra=CHANGEABLE)
    """Held-out batches of one evaluation; all of them when not given."""

    @property
    def packs_documents(self) -> bool:
        """Return whether a row holds several documents that must not see each other."""
        return self.mask_documents

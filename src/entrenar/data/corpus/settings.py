"""The settings of reading documents and of building a corpus."""

from pydantic import BaseModel, ConfigDict, Field


class SourceConfig(BaseModel):
    """Settings for reading documents from sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    text_field: str = "text"
    """Field of a row (jsonl, JSON, csv, tsv or parquet) that holds the document."""
    document_separator: str | None = None
    """Text between two documents of a text file, such as <|endoftext|>; without it a file is one document."""
    include: tuple[str, ...] = ("*",)
    """File names to take from a folder, as patterns (*.py)."""
    max_file_bytes: int = Field(default=4 << 20, gt=0)
    """Larger text files of a folder are left out."""
    max_document_bytes: int = Field(default=1 << 20, ge=16)
    """Longer documents are cut at line starts into several."""


class PrepareConfig(SourceConfig):
    """Settings for building a corpus."""

    val_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the documents held out for validation; 0 holds out none, and a run on the corpus measures nothing."""
    dedup: bool = True
    """Drop duplicate documents."""
    shard_tokens: int = Field(default=1 << 26, ge=1)
    """Tokens in a shard file."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Encoding threads; all cores if not given."""
    vocab_size: int = Field(default=8192, ge=1)
    """Vocabulary of the tokenizer that is trained when none is given."""
    tokenizer_sample_bytes: int = Field(default=32 << 20, ge=1)
    """Bytes of training text that a new tokenizer is trained on, to within a document."""

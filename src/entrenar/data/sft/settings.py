"""Define the settings for the data of a fine-tuning run."""

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from entrenar.data.sft.prompt_template import PromptTemplate
from entrenar.runs import CHANGEABLE, FIXED

TrainOn = Literal["answers", "last", "all"]
PromptFormat = Literal["auto", "chat", "alpaca", "plain"]
Batching = Literal["packed", "grouped", "padded"]


class SftConfig(BaseModel):
    """Which rows, how they become tokens, and how the tokens become batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: tuple[Path, ...] = Field(min_length=1)
    """Files of rows: jsonl, json, parquet, csv or tsv."""
    eval_data: tuple[Path, ...] = ()
    """Held-out rows; a share of `data` when not given."""
    eval_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the rows of `data` held out when there is no `eval_data`; equal rows fall on the same side."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a csv or tsv file whose first line is not their names."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of rows and keys of messages to leave out; any other field that is not used makes a row faulty."""
    prompt_template: str | None = None
    """Prompt made from a row's fields, such as "Review: {sentence}" or "{answers.text[0]}"; for other rows."""
    completion_template: str | None = Field(default=None, validate_default=True)
    """Answer made from a row's fields, such as " {label}"; goes with prompt_template."""
    prompt_format: PromptFormat = "auto"
    """Text around the turns: chat is the tokenizer's template; auto is chat if there is a template, else alpaca."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) that a chat template is told; the day a run starts when not given, kept when it is resumed."""
    train_on: TrainOn = Field(default="answers", json_schema_extra=FIXED)
    """Trained tokens: all answers, the last answer only, or all tokens; a row's own marks leave out more."""
    long_rows: Literal["drop", "cut", "stop"] = "drop"
    """Rows longer than seq_len: leave them out, cut their end off, or stop; the count is printed."""
    bad_rows: Literal["stop", "quarantine"] = "stop"
    """Faulty rows: stop and name their lines, or write them to quarantine.jsonl in the run's folder."""
    batch_size: int = Field(default=8, ge=1, le=1 << 20, json_schema_extra=FIXED)
    """Rows in one micro-batch."""
    seq_len: int = Field(default=512, ge=1, le=1 << 31, json_schema_extra=FIXED)
    """Tokens in a row at most."""
    batching: Batching = Field(default="packed", json_schema_extra=FIXED)
    """Several examples in a row that do not see each other (packed), rows of like length (grouped), or neither."""
    max_eval_examples: int | None = Field(default=None, ge=1, json_schema_extra=CHANGEABLE)
    """Most held-out examples of one evaluation; all of them when not given."""

    @property
    def packs_documents(self) -> bool:
        """Return whether a row holds several documents that must not see each other."""
        return self.batching == "packed"

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("template_date")
    @classmethod
    def _is_a_date(cls, value: str | None) -> str | None:
        return value if value is None else date.fromisoformat(value).isoformat()

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _braces_name_fields(cls, value: str | None) -> str | None:
        if value is not None:
            PromptTemplate(value)
        return value

    @field_validator("completion_template")
    @classmethod
    def _templates_come_in_pairs(cls, value: str | None, info: Any) -> str | None:
        if "prompt_template" in info.data and (value is None) != (info.data["prompt_template"] is None):
            raise ValueError("prompt_template and completion_template must be given together, got one of them")
        return value

"""The settings of generating text, of chatting, and of the questions asked during fine-tuning."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from entrenar.runs import CHANGEABLE

Metric = Literal["exact_match", "accuracy"]


class GenerateConfig(BaseModel):
    """Settings for sampling tokens, and when generation stops."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=256, gt=0)
    """Most new tokens; the model's context may end earlier."""
    temperature: float = Field(default=1.0, ge=0)
    """Below 1 favors likely tokens, above 1 evens them out; 0 always takes the most likely token."""
    top_k: int | None = Field(default=None, gt=0)
    """Choose among this many of the most likely tokens."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Choose among the fewest tokens whose probabilities reach this sum."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Choose among tokens at least this share as likely as the most likely one."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the prompt and of the text so far become less likely."""
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    """Seed of the random choices: the same seed writes the same text."""
    decode: Literal["auto", "exact"] = "auto"
    """How a quantized model multiplies: auto widens each weight once, in 8 or 16 bits, while it writes; exact reads the
    weights as they are for every token."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of its result."""
    allow_special: bool = False
    """Read names of control tokens in a prompt, such as <s>, as those tokens; otherwise they are plain text."""
    eos_token_ids: tuple[int, ...] | None = None
    """Tokens that end the generation; the model's own when not given."""

    @model_validator(mode="after")
    def _stops_are_text(self) -> "GenerateConfig":
        if "" in self.stop:
            raise ValueError(
                "stop must not contain the empty text, which would end every generation at once; remove it"
            )
        return self


class ChatConfig(GenerateConfig):
    """Settings for sampling an answer's tokens, and when the answer stops."""

    max_new_tokens: int = Field(default=512, gt=0)
    """Most tokens of an answer."""
    temperature: float = Field(default=0.7, ge=0)
    """Below 1 favors likely tokens, above 1 evens them out; 0 always takes the most likely token."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Choose among the fewest tokens whose probabilities reach this sum."""


class TaskConfig(BaseModel):
    """The questions asked of the model during fine-tuning, in addition to the held-out loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task_data: Path | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """File of rows whose answers are asked for at each evaluation."""
    metric: Metric = Field(default="exact_match", json_schema_extra=CHANGEABLE)
    """exact_match writes the answer; accuracy chooses among all answers of the file, for tasks with labels."""
    max_task_examples: int = Field(default=200, ge=1, json_schema_extra=CHANGEABLE)
    """Most rows of `task_data` that are asked, from the first on."""
    sample_answers: int = Field(default=2, ge=0, json_schema_extra=CHANGEABLE)
    """Held-out prompts whose answers are shown at each evaluation."""
    max_answer_tokens: int = Field(default=64, ge=1, json_schema_extra=CHANGEABLE)
    """Most tokens of a written answer."""

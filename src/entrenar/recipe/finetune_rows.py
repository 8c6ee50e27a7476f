"""The rows of a fine-tuning run: training rows, held-out rows, and the questions of a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entrenar.config import FinetuneConfig
from entrenar.data import Example, Tokenizer, accept, read_examples, split
from entrenar.infer import Question
from entrenar.recipe.start import Observer

QUARANTINE_FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class Rows:
    """The examples of a run, and the questions of its task."""

    train: list[Example]
    held_out: list[Example]
    questions: list[Question]


def read_rows(config: FinetuneConfig, tokenizer: Tokenizer, observer: Observer) -> Rows:
    """Read training rows, held-out rows and the task's questions, and report counts.

    Raises: DataError.
    """
    sft, task = config.sft, config.task
    train = _examples(config, sft.data, tokenizer, observer, QUARANTINE_FILE)
    if sft.eval_data:
        held_out = _examples(config, sft.eval_data, tokenizer, observer, f"eval-{QUARANTINE_FILE}")
    else:
        train, held_out = split(train, sft.eval_fraction, config.train.seed)
    asked: list[Example] = []
    if task.task_data is not None:
        asked = _examples(config, (task.task_data,), tokenizer, observer, f"task-{QUARANTINE_FILE}")
    questions = [question_of(example) for example in asked[: task.max_task_examples]]
    return Rows(train, held_out[: sft.max_eval_examples], questions)


def _examples(
    config: FinetuneConfig, files: Sequence[Path], tokenizer: Tokenizer, observer: Observer, quarantine: str
) -> list[Example]:
    found = read_examples(files, tokenizer, config.sft)
    for note in found.notes(config.sft):
        observer.on_stage(f"{', '.join(map(str, files))}: {note}")
    return accept(found, config.sft, config.run_dir / quarantine)


def question_of(example: Example) -> Question:
    """Return the last answer of an example and the text before it."""
    start = example.answer_start
    return Question(tuple(example.ids[:start].tolist()), tuple(example.ids[start:].tolist()))

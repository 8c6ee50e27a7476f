"""Measure a fine-tuned model on its task, in addition to the loss: tokens, whole answers, or the choice of a label.

- token accuracy: the share of answer tokens that the model finds most likely, given everything before them;
- exact match: the share of prompts whose greedy continuation is the answer, apart from spaces around it;
- accuracy: the share of prompts whose own answer is the most likely of all answers in the file, for tasks with labels.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.errors import DataError
from entrenar.infer.evaluate import EvalBatch
from entrenar.infer.generate import end_tokens, generate
from entrenar.infer.settings import GenerateConfig
from entrenar.model import Llama

MAX_LABELS = 64
_QUESTIONS_AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    """A prompt and the expected answer, both as tokens; the answer may end in an end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def write_answers(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, rows: int = 16
) -> list[str]:
    """Return the model's greedy answer to each prompt."""
    config = GenerateConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    ends = end_tokens(model.config, config)
    answers: list[str] = []
    for first in range(0, len(prompts), rows):
        some = prompts[first : first + rows]
        steps = list(generate(model, some, config, num_tokens=tokenizer.vocab_size))
        written = [_until_end((step[row] for step in steps), ends) for row in range(len(some))]
        answers += [_text_after(tokenizer, prompt, ids) for prompt, ids in zip(some, written, strict=True)]
    return answers


def _until_end(tokens: Iterable[int | None], ends: Collection[int]) -> list[int]:
    """Return a row's tokens without the one that ends it and the gaps after."""
    return [token for token in tokens if token is not None and token not in ends]


def _text_after(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    stream = tokenizer.decode_stream(prompt)
    return stream.feed(ids) + stream.finish()


def exact_match(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int) -> list[bool]:
    """Return for each question whether the model's answer is the expected one.

    Raises:
        DataError: there is no question.
    """
    _need(questions)
    wanted = [_text_after(tokenizer, question.prompt, question.answer).strip() for question in questions]
    written = write_answers(model, tokenizer, [question.prompt for question in questions], max_new_tokens)
    return [one.strip() == other for one, other in zip(written, wanted, strict=True)]


@torch.no_grad()
def accuracy(model: Llama, questions: Sequence[Question]) -> list[bool]:
    """Return for each question whether its answer is the most likely of all answers to the questions.

    Raises:
        DataError: there is no question, or too few or too many different answers.
    """
    _need(questions)
    labels = sorted({question.answer for question in questions})
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"metric = accuracy needs 2 to {MAX_LABELS} different answers to choose from, "
            f"the task has {len(labels)}; use exact_match"
        )
    right = []
    for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
        some = questions[first : first + _QUESTIONS_AT_ONCE]
        chosen = _scores(model, [question.prompt for question in some], labels).argmax(1).tolist()
        right += [labels[label] == question.answer for label, question in zip(chosen, some, strict=True)]
    return right


def _scores(model: Llama, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Tensor:
    """Return the log probability of each label after each prompt, (prompts, labels)."""
    device = model.device
    length = max(map(len, prompts)) + max(map(len, labels)) - 1
    ids = torch.zeros(len(prompts) * len(labels), length, dtype=torch.int64)
    is_asked = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, label) in enumerate(product(prompts, labels)):
        whole = [*prompt, *label][:-1]
        ids[row, : len(whole)] = torch.tensor(whole)
        is_asked[row, len(prompt) - 1 : len(whole)] = True
    ids, is_asked = ids.to(device), is_asked.to(device)
    logits = model.logits(model.hidden(ids)[is_asked][None])[0].float()  # (answer tokens, V)
    wanted = torch.tensor([token for label in labels for token in label], device=device).repeat(len(prompts))
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    sums = torch.zeros(len(ids), device=device).index_add_(0, is_asked.nonzero()[:, 0], chosen)
    return sums.view(len(prompts), len(labels))


def _need(questions: Sequence[Question]) -> None:
    if not questions:
        raise DataError("a task needs at least one row with an answer, got none")


@torch.no_grad()
def token_hits(model: Llama, batches: Iterable[EvalBatch]) -> Iterator[tuple[int, int]]:
    """Yield for each batch the number of targets that the model finds most likely, and the number of targets."""
    device = model.device
    for batch in batches:
        targets = batch.targets.to(device)
        is_target = targets != -100
        hidden = model.hidden(batch.input_ids.to(device), documents=batch.documents)[is_target]  # (N, D)
        found = torch.cat([model.logits(part[None])[0].argmax(-1) for part in torch.split(hidden, 512)])
        yield int((found == targets[is_target]).sum()), int(is_target.sum())

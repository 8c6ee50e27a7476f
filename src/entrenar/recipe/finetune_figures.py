"""Measure a fine-tuned model: held-out loss, token accuracy, the task, and sample answers."""

from dataclasses import dataclass

from entrenar.config import FinetuneConfig
from entrenar.data import Batch, Tokenizer, held_out_batches
from entrenar.infer import Evaluation, accuracy, evaluate, exact_match, token_hits, write_answers
from entrenar.model import Llama
from entrenar.model.batch_loss import BatchLoss
from entrenar.recipe.finetune_rows import Rows, question_of


@dataclass(frozen=True)
class Figures:
    """A model's results on the held-out rows, and on the task if there is one.

    Attributes:
        held_out: loss and perplexity.
        token_accuracy: the share of held-out answer tokens that the model finds most likely.
        task: the share of the task's questions that were answered right.
    """

    held_out: Evaluation
    token_accuracy: float
    task: float | None


@dataclass(frozen=True)
class HeldOut:
    """A model with the rows that it is measured on."""

    config: FinetuneConfig
    model: Llama
    tokenizer: Tokenizer
    rows: Rows

    def measure(self) -> Figures | None:
        """Return every figure, without the trunk cache; None if there are no held-out rows."""
        if not self.rows.held_out:
            return None
        batches = self._batches()
        self.model.eval()
        evaluation = evaluate(self.model, batches)
        hits = list(token_hits(self.model, batches))
        token_accuracy = sum(right for right, _ in hits) / sum(asked for _, asked in hits)
        return Figures(evaluation, token_accuracy, self._task_share())

    def figures_by(self, loss: BatchLoss) -> dict[str, float]:
        """Return the figures of an evaluation during training: the held-out loss by `loss`, and the task."""
        total, targets = 0.0, 0
        for batch in self._batches():
            total += float(loss(batch))
            targets += batch.num_targets
        figures = {"loss": total / targets}
        share = self._task_share()
        return figures if share is None else {**figures, self.config.task.metric: share}

    def sample_lines(self) -> list[str]:
        """Return a few held-out prompts with the answers that are wanted and written."""
        limit = self.model.config.context_length
        examples = [example for example in self.rows.held_out if 0 < example.answer_start < limit]
        questions = [question_of(example) for example in examples[: self.config.task.sample_answers]]
        prompts = [question.prompt for question in questions]
        lines = []
        answers = write_answers(self.model, self.tokenizer, prompts, self.config.task.max_answer_tokens)
        for question, answer in zip(questions, answers, strict=True):
            asked, wanted = (self.tokenizer.decode(ids) for ids in (question.prompt, question.answer))
            lines += [
                f"  asked  … {asked[-80:]!r}",
                f"  wanted   {wanted.strip()!r:.100}",
                f"  answer → {answer.strip()!r:.100}",
            ]
        return lines

    def _batches(self) -> list[Batch]:
        sft = self.config.sft
        return list(held_out_batches(self.rows.held_out, batch_size=sft.batch_size, seq_len=sft.seq_len))

    def _task_share(self) -> float | None:
        questions = self.rows.questions
        if not questions:
            return None
        if self.config.task.metric == "accuracy":
            right = accuracy(self.model, questions)
        else:
            right = exact_match(self.model, self.tokenizer, questions, self.config.task.max_answer_tokens)
        return sum(right) / len(right)

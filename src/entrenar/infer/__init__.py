"""What a trained model is for: writing text, and being measured on text."""

from entrenar.infer.complete import Completion, TextTokenizer, complete, stream, stream_rows
from entrenar.infer.evaluate import Evaluation, evaluate
from entrenar.infer.generate import GenerateConfig, generate
from entrenar.infer.task import Question, TaskConfig, accuracy, exact_match, token_hits, write_answers

__all__ = [
    "Completion",
    "Evaluation",
    "GenerateConfig",
    "Question",
    "TaskConfig",
    "TextTokenizer",
    "accuracy",
    "complete",
    "evaluate",
    "exact_match",
    "generate",
    "stream",
    "stream_rows",
    "token_hits",
    "write_answers",
]

from entrenar.infer.chat import ChatSession
from entrenar.infer.complete import Completion, TextTokenizer, complete, named_tokens, stream, stream_rows
from entrenar.infer.evaluate import Evaluation, evaluate
from entrenar.infer.generate import generate
from entrenar.infer.settings import ChatConfig, GenerateConfig, TaskConfig
from entrenar.infer.task import Question, accuracy, exact_match, token_hits, write_answers

__all__ = [
    "ChatConfig",
    "ChatSession",
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
    "named_tokens",
    "stream",
    "stream_rows",
    "token_hits",
    "write_answers",
]

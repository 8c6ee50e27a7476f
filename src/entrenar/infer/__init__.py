"""What a trained model is for: writing text, and being measured on text."""

from entrenar.infer.complete import Completion, TextTokenizer, complete, stream
from entrenar.infer.evaluate import Evaluation, evaluate
from entrenar.infer.generate import GenerateConfig, generate

__all__ = [
    "Completion",
    "Evaluation",
    "GenerateConfig",
    "TextTokenizer",
    "complete",
    "evaluate",
    "generate",
    "stream",
]

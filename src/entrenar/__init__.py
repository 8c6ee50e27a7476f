"""Train and fine-tune LLaMA models on the machine you have, and check that it was done correctly.

`pretrain`, `finetune`, `load`, `generate`, `evaluate`, `plan`, `convert` and `LlamaConfig` are the library's front door
(`entrenar.api`). Importing the package loads nothing; the first of these names that is used loads torch.
"""

from typing import TYPE_CHECKING, Any

from entrenar.version import __version__

__all__ = ["LlamaConfig", "__version__", "convert", "evaluate", "finetune", "generate", "load", "plan", "pretrain"]

if TYPE_CHECKING:
    from entrenar.api import LlamaConfig, convert, evaluate, finetune, generate, load, plan, pretrain


def __getattr__(name: str) -> Any:
    """Load the library when one of its names is first used (PEP 562)."""
    if name in __all__:
        from entrenar import api  # noqa: PLC0415  # this is what makes it lazy

        return getattr(api, name)
    raise AttributeError(f"module 'entrenar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

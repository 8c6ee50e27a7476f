"""Choose a model size that suits the corpus and the machine, where the user gave none.

A model wants about 20 tokens for each parameter (Hoffmann et al. 2022, arXiv:2203.15556), and up to four passes over a
text teach almost as much as new text (Muennighoff et al. 2023, arXiv:2305.16264). So the largest model is taken that
has a parameter for each five tokens of the corpus, and whose training state takes at most half of the memory.
"""

from entrenar.config import RunConfig
from entrenar.data import Corpus
from entrenar.errors import OutOfMemoryError
from entrenar.memory import MemoryLimit, memory_limit
from entrenar.model import LlamaConfig

_TOKENS_PER_PARAMETER = 5
_WIDTHS = (768, 512, 384, 256, 192, 128, 64)
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4}
_BFLOAT16_REMAINDER = 2


def sized(config: RunConfig, *, vocab_size: int, tokens: int, room_bytes: int) -> RunConfig:
    """Fill in vocabulary and width where neither a preset nor [model] gives them; fields that are set stay.

    `vocab_size` comes from the corpus' tokenizer, `tokens` is the number of its training tokens.
    """
    own = config.model.model_dump(exclude_unset=True)
    if config.preset is not None or {"vocab_size", "hidden_size"} <= own.keys():
        return config
    own = {"vocab_size": vocab_size} | own
    if "hidden_size" in own:
        return _with_model(config, LlamaConfig.model_validate(own))
    for width in _WIDTHS:
        chosen = _with_model(config, LlamaConfig.of_width(width, **own))
        is_taught = chosen.model.parameter_count() <= tokens // _TOKENS_PER_PARAMETER
        if is_taught and least_bytes(chosen) <= room_bytes // 2:
            break
    return chosen


def sized_for_corpus(config: RunConfig) -> RunConfig:
    """Size the model of a run from the manifest of its corpus; without a corpus return the config unchanged."""
    if not (config.data.corpus[0] / "manifest.json").is_file():
        return config
    corpora = [Corpus.open(folder, verify=False) for folder in config.data.corpus]
    tokens = sum(corpus.manifest.splits["train"].tokens for corpus in corpora)
    vocab_size = corpora[0].manifest.tokenizer.vocab_size
    return sized(config, vocab_size=vocab_size, tokens=tokens, room_bytes=memory_limit().size_bytes)


def least_bytes(config: RunConfig) -> int:
    """Return the memory of weights, gradients and moments: what a run takes in any case, before activations."""
    weight = _WEIGHT_BYTES[config.train.precision]
    remainder = _BFLOAT16_REMAINDER if config.train.precision == "bfloat16" else 0
    return config.model.parameter_count() * (2 * weight + remainder + _MOMENT_BYTES[config.optim.optimizer])


def check_room(config: RunConfig, limit: MemoryLimit | None = None) -> None:
    """Refuse a run that cannot fit, before allocating memory for it.

    Raises: OutOfMemoryError that says what would fit.
    """
    limit = limit or memory_limit()
    least = least_bytes(config)
    if least <= limit.size_bytes:
        return
    name = f" --preset {config.preset}" if config.preset else ""
    raise OutOfMemoryError(
        f"training {config.model.parameter_count():,} parameters takes at least {least / 1e9:,.1f} GB for weights, "
        f"gradients and moments, but {limit.source} is {limit.size_bytes / 1e9:,.1f} GB; "
        f"`entrenar plan{name}` shows what fits, or leave out --preset and [model] for a model that does"
    )


def _with_model(config: RunConfig, model: LlamaConfig) -> RunConfig:
    return config.model_copy(update={"model": model})

"""Train a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909; on bytes, Radford et al. 2019).

Every byte has a token, so every string round-trips exactly. Words are cut by LLaMA 3's pattern, which keeps an
indentation and the word after it apart and groups at most three digits: right for code and for prose. Training is
deterministic: equal texts in equal order give an equal tokenizer.
"""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import ConfigError, DataError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Train on `texts`; the vocabulary is smaller than `vocab_size` when the texts have too few different words.

    Raises: ConfigError for a vocabulary that cannot hold the bytes and control tokens; DataError if there is no text.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes and {len(SPECIAL_TOKENS)} control tokens), "
            f"got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counted = _Counted(texts)
    backend.train_from_iterator(counted, trainer=trainer)
    if counted.characters == 0:
        raise DataError("no text to train a tokenizer on: every source is empty")
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True, "add_eos_token": False}
    return Tokenizer(json.loads(backend.to_str()), config, "trained tokenizer")


class _Counted:
    """Counts the characters that pass, since the trainer does not say whether it saw any."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.characters = 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text

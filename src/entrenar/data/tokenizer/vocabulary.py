"""A tokenizer as the formats without a `tokenizer.json` keep it: a list of tokens, their scores and kinds, or merges.

GGUF and llama2.c's `tokenizer.bin` hold such a list. Of the two families, "pieces" (sentencepiece) needs a score for
each piece: the pair whose joined piece scores highest is merged first, leftmost first. Where only ranked merges are
known (a `tokenizer.json`), a piece scores minus the rank of the first merge that makes it, which merges in the same
order. "bytes" (byte-level BPE) keeps its merges and the name of the pattern that cuts words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from entrenar.data.tokenizer.sentencepiece import SentencePieceModel, tokenizer_json
from entrenar.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
WordPattern = Literal["llama3", "gpt2", "digits", "qwen2", "tekken", "default"]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each pattern cuts what the ones before it left whole. `digits` is SmolLM's and StarCoder's rule: each digit by itself.
WORD_PATTERNS: Mapping[WordPattern, tuple[str, ...]] = {
    "llama3": (LLAMA3_PATTERN,),
    "gpt2": (GPT2_PATTERN,),
    "digits": (r"\p{N}", GPT2_PATTERN),
    "qwen2": (LLAMA3_PATTERN.replace("{1,3}", ""),),
    "tekken": (TEKKEN_PATTERN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# A word that is a token is that token, whatever its merges say.
WHOLE_WORDS: frozenset[WordPattern] = frozenset(("llama3", "tekken"))


@dataclass(frozen=True)
class Vocabulary:
    """The data that must be stored to rebuild a tokenizer.

    Attributes:
        tokens: the text of each id; in the bytes family in GPT-2's printable alphabet.
        scores: of each id; zeros in the bytes family.
        kinds: sentencepiece's type of each id (NORMAL … BYTE).
        merges: pairs by rank, bytes family only.
        pattern: what cuts words, bytes family only.
    """

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    merges: list[tuple[str, str]]
    pattern: WordPattern | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    adds_space: bool
    chat_template: str | None

    @property
    def family(self) -> str:
        """The kind of tokenizer: "bytes" or "pieces"."""
        return "pieces" if self.pattern is None else "bytes"


def tokenizer_files(vocabulary: Vocabulary, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of `tokenizer.json` and of `tokenizer_config.json`.

    Raises:
        FormatError: naming `place` and the field, for a list that no tokenizer can have.
    """
    _check(vocabulary, place)
    content = _pieces_json(vocabulary, place) if vocabulary.pattern is None else _bytes_json(vocabulary)
    named = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_id,
        "pad_token": vocabulary.pad_id,
        "unk_token": vocabulary.unk_id,
    }
    config: dict[str, Any] = {role: vocabulary.tokens[index] for role, index in named.items() if index is not None}
    config |= {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos}
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return content, config


def _check(vocabulary: Vocabulary, place: str) -> None:
    size = len(vocabulary.tokens)
    if not len(vocabulary.scores) == len(vocabulary.kinds) == size or size == 0:
        raise FormatError(
            f"{place}: the vocabulary must have as many scores and kinds as tokens, and some, "
            f"got {size} tokens, {len(vocabulary.scores)} scores, {len(vocabulary.kinds)} kinds"
        )
    first: dict[str, int] = {}
    for index, (token, score) in enumerate(zip(vocabulary.tokens, vocabulary.scores, strict=True)):
        if first.setdefault(token, index) != index:
            raise FormatError(f"{place}: token {index} repeats token {first[token]}, {token!r}")
        if not token or math.isnan(score):
            raise FormatError(f"{place}: token {index} must have text and a score, got {token!r} and {score}")
    for role in ("bos_id", "eos_id", "pad_id", "unk_id"):
        index = getattr(vocabulary, role)
        if index is not None and not 0 <= index < size:
            raise FormatError(f"{place}: {role} is {index}, but there are {size} tokens")


def _pieces_json(vocabulary: Vocabulary, place: str) -> dict[str, Any]:
    kinds = list(vocabulary.kinds)
    unk_id = vocabulary.unk_id if vocabulary.unk_id is not None else 0
    if kinds[unk_id] not in (UNKNOWN, CONTROL):
        raise FormatError(f"{place}: the unknown token is {unk_id}, {vocabulary.tokens[unk_id]!r}, of another kind")
    kinds[unk_id] = UNKNOWN
    model = SentencePieceModel(
        pieces=list(zip(vocabulary.tokens, vocabulary.scores, kinds, strict=True)),
        model_type=_BPE,
        byte_fallback=BYTE in kinds,
        unk_id=unk_id,
        bos_id=-1 if vocabulary.bos_id is None else vocabulary.bos_id,
        eos_id=-1 if vocabulary.eos_id is None else vocabulary.eos_id,
        pad_id=-1 if vocabulary.pad_id is None else vocabulary.pad_id,
        add_dummy_prefix=vocabulary.adds_space,
        remove_extra_whitespaces=False,
    )
    return tokenizer_json(model)


def _bytes_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Restate a vocabulary of the bytes family in the layout of `tokenizer.json`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added: list[dict[str, Any]] = [
        {"id": index, "content": token, **plain, "special": kind == CONTROL}
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocab = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind == NORMAL
    }
    # Whatever the file says, `tokenizers` numbers added tokens after the vocabulary unless they are part of it.
    is_behind = [token["id"] for token in added] == list(range(len(vocab), len(vocab) + len(added)))
    if not is_behind:
        vocab |= {token["content"]: token["id"] for token in added}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # No control token must be among the words.
        "ignore_merges": vocabulary.pattern in WHOLE_WORDS and is_behind,
        "vocab": vocab,
        "merges": [list(merge) for merge in vocabulary.merges],
    }
    return _byte_level_file(vocabulary, added, model)


def _byte_level_file(vocabulary: Vocabulary, added: list[dict[str, Any]], model: dict[str, Any]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in WORD_PATTERNS[vocabulary.pattern or "llama3"]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "post_processor": _bos_template(vocabulary),
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},  # as `tokenizers` and LLaMA 3 have it
        "model": model,
    }


def _bos_template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Build the tokenizer.json entry that puts BOS before a text; only other programs read it."""
    if vocabulary.bos_id is None or not vocabulary.add_bos:
        return None
    bos = vocabulary.tokens[vocabulary.bos_id]
    mark, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [mark, text, *second],
        "special_tokens": tokens,
    }

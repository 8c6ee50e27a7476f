"""Tokenizers for other programs: GGUF's token list and llama2.c's `tokenizer.bin`.

Both formats hold a list of tokens, so a tokenizer is first restated as one (`Vocabulary`). The readers are in
`entrenar.data.tokenizer`, because a model may come with any of these files.
"""

import struct
from collections.abc import Sequence
from typing import Any

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.sentencepiece import SPACE
from entrenar.data.tokenizer.token_bytes import decoder_family
from entrenar.data.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    GPT2_PATTERN,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_PATTERNS,
    Vocabulary,
    WordPattern,
)
from entrenar.errors import FormatError


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Restate a tokenizer.

    Raises:
        FormatError: it cuts words by a pattern that the other formats have no name for.
    """
    content = tokenizer.content
    model = content["model"]
    family, _ = decoder_family(content.get("decoder"), "tokenizer")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens: list[str] = [""] * tokenizer.vocab_size
    for token, index in model["vocab"].items():
        tokens[index] = token
    kinds = [NORMAL if token else UNUSED for token in tokens]
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unk_id = tokenizer.id_of(model["unk_token"]) if model.get("unk_token") else None
    if unk_id is not None:
        kinds[unk_id] = UNKNOWN
    if family == "pieces" and model.get("byte_fallback"):
        for byte in range(256):
            index = tokenizer.id_of(f"<0x{byte:02X}>")
            if index is not None:
                kinds[index] = BYTE
    tokens = [token or f"[UNUSED{index}]" for index, token in enumerate(tokens)]
    return Vocabulary(
        tokens=tokens,
        scores=_scores(tokens, kinds, merges) if family == "pieces" else [0.0] * len(tokens),
        kinds=kinds,
        merges=merges if family == "bytes" else [],
        pattern=_pattern(content.get("pre_tokenizer")) if family == "bytes" else None,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        unk_id=unk_id,
        add_bos=tokenizer.add_bos,
        add_eos=tokenizer.add_eos,
        adds_space=tokenizer.adds_space,
        chat_template=tokenizer.chat_template,
    )


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    lowest = len(merges)
    return [
        -float(first.get(token, lowest)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)
    ]


def _pattern(pre_tokenizer: Any) -> WordPattern:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    cuts, last = steps[:-1], steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        found = tuple(map(_cut, cuts)) + ((GPT2_PATTERN,) if last.get("use_regex", True) else ())
        for name, patterns in WORD_PATTERNS.items():
            if found == patterns:
                return name
    raise FormatError(
        f"tokenizer.json: pre_tokenizer cuts words like none of {', '.join(WORD_PATTERNS)}, and other formats know "
        "cuts by name only; keep the Hugging Face folder"
    )


def _cut(step: Any) -> str | None:
    """Return the pattern whose matches one step isolates, None for a step of another kind."""
    if step.get("type") == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    is_plain = step.get("behavior") == "Isolated" and not step.get("invert")
    return step.get("pattern", {}).get("Regex") if step.get("type") == "Split" and is_plain else None


def tokenizer_bin(tokenizer: Tokenizer, vocab_size: int) -> bytes:
    """Return a `tokenizer.bin` of `vocab_size` tokens.

    Raises:
        FormatError: llama2.c's program could not encode with this tokenizer.
    """
    vocabulary = vocabulary_of(tokenizer)
    roles = (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id)
    if vocabulary.family != "pieces" or roles != (0, 1, 2) or not vocabulary.adds_space:
        raise FormatError(
            "llama2.c reads sentencepiece tokenizers with <unk>, <s>, </s> as ids 0, 1, 2 and a leading space only, "
            f"got family {vocabulary.family}, ids {roles}; convert to gguf, or leave the tokenizer out (--no-tokenizer)"
        )
    texts = [text.replace(SPACE, " ") for text in vocabulary.tokens]
    texts[1], texts[2] = "\n<s>\n", "\n</s>\n"
    texts += [f"<unused{index}>" for index in range(len(texts), vocab_size)]
    scores = vocabulary.scores + [0.0] * (len(texts) - len(vocabulary.scores))
    encoded = [text.encode() for text in texts]
    parts = [struct.pack("<I", max(map(len, encoded)))]
    parts += [struct.pack("<fi", score, len(data)) + data for score, data in zip(scores, encoded, strict=True)]
    return b"".join(parts)

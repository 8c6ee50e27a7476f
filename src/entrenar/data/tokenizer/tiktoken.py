"""LLaMA 3's `tokenizer.model`: a line for each token, its bytes in base64 and its rank.

The rank is both id and order: of all adjacent pairs that join to a token, the one of lowest rank is merged first
(tiktoken, github.com/openai/tiktoken). So every split of a token into two tokens becomes a merge, ranked by what it
makes. Control tokens stand behind the last rank; their names are Meta's, in Meta's order (llama3, `tokenizer.py`),
and belong to files of LLaMA 3's size only.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from entrenar.data.tokenizer.token_bytes import byte_alphabet
from entrenar.data.tokenizer.vocabulary import CONTROL, NORMAL, Vocabulary, tokenizer_files
from entrenar.errors import FormatError

_LLAMA3_RANKS = 128_000
_NUM_CONTROL = 256
_MAX_TOKEN_BYTES = 1 << 12


def llama3_control_tokens() -> list[str]:
    """Return the 256 control tokens of LLaMA 3, in the order of their ids."""
    named = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
        "<|eot_id|>", "<|python_tag|>",
    ]  # fmt: skip
    return named + [f"<|reserved_special_token_{number}|>" for number in range(2, _NUM_CONTROL - len(named) + 2)]


def is_tiktoken(path: Path) -> bool:
    """Return whether a file is a rank file and not a sentencepiece model, judged by its first line."""
    with path.open("rb") as stream:
        parts = stream.readline(_MAX_TOKEN_BYTES).split()
    return len(parts) == 2 and parts[1] == b"0" and parts[0].isascii()


def read_tiktoken(path: Path, control: list[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a rank file as the content of `tokenizer.json` and `tokenizer_config.json`.

    `control` are the tokens behind the last rank; for a file of LLaMA 3's size they are LLaMA 3's.

    Raises:
        FormatError: naming file and line.
    """
    ranks = _read_ranks(path)
    if control is None:
        control = llama3_control_tokens() if len(ranks) == _LLAMA3_RANKS else []
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    tokens = ["".join(letters[byte] for byte in token) for token in ranks] + control
    ids = {name: len(ranks) + number for number, name in enumerate(control)}
    vocabulary = Vocabulary(
        tokens=tokens,
        scores=[0.0] * len(tokens),
        kinds=[NORMAL] * len(ranks) + [CONTROL] * len(control),
        merges=_merges(tokens[: len(ranks)]),
        pattern="llama3",
        bos_id=ids.get("<|begin_of_text|>"),
        eos_id=ids.get("<|end_of_text|>"),
        pad_id=ids.get("<|finetune_right_pad_id|>"),
        unk_id=None,
        add_bos="<|begin_of_text|>" in ids,
        add_eos=False,
        adds_space=False,
        chat_template=None,
    )
    return tokenizer_files(vocabulary, str(path))


def _read_ranks(path: Path) -> list[bytes]:
    ranks: list[bytes] = []
    lines: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error) as error:
            raise FormatError(f"{path}, line {number}: must be base64 and a rank, got {line[:80]!r}") from error
        if value != len(ranks):
            raise FormatError(f"{path}, line {number}: ranks must count up from 0, expected {len(ranks)}, got {value}")
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise FormatError(f"{path}, line {number}: a token has 1 to {_MAX_TOKEN_BYTES} bytes, got {len(token)}")
        if lines.setdefault(token, number) != number:
            raise FormatError(f"{path}, line {number}: token {token!r} is on line {lines[token]} too")
        ranks.append(token)
    missing = [byte for byte in range(256) if bytes([byte]) not in lines]
    if missing:
        raise FormatError(f"{path}: {len(missing)} single bytes have no token, {missing[0]:#04x} first")
    return ranks


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    rank = {token: index for index, token in enumerate(tokens)}
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in sorted(
            (cut for cut in range(1, len(token)) if token[:cut] in rank and token[cut:] in rank),
            key=lambda cut: (rank[token[:cut]], rank[token[cut:]]),
        )
    ]

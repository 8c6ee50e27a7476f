"""The bytes that each token stands for, and text from tokens one at a time.

Why: decoding by a table of bytes is exact for both families of LLaMA tokenizers (byte-level BPE; sentencepiece with
byte fallback), needs no look at the tokens that came before, and gives the number of bytes behind a batch, which bits
per byte needs. A token may end in the middle of a character, so text is released only when its last character is
whole (RFC 3629).
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any

from entrenar.errors import DataError, FormatError

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each of the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _decoder_steps(decoder: Any) -> list[Mapping[str, Any]]:
    if not isinstance(decoder, Mapping):
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in _decoder_steps(part)]
    return [decoder]


def decoder_family(decoder: Any, place: str) -> tuple[str, bool]:
    """Return how tokens become bytes: ("bytes" or "pieces", does decoding drop one leading space).

    Raises: FormatError for a decoder of another family.
    """
    steps = {step.get("type"): step for step in _decoder_steps(decoder)}
    if "ByteLevel" in steps:
        return "bytes", False
    if "Metaspace" in steps:
        return "pieces", steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in steps or "Replace" in steps:
        return "pieces", "Strip" in steps and steps["Strip"].get("start") == 1
    raise FormatError(
        f"{place}: decoder must be ByteLevel or sentencepiece-like (Replace, ByteFallback, Metaspace), "
        f"as LLaMA tokenizers are; got {sorted(map(str, steps)) or 'none'}"
    )


def bytes_of_tokens(vocab: Mapping[str, int], added: Mapping[int, str], family: str) -> list[bytes]:
    """Return the bytes of each id; ids that no token has give b""."""
    alphabet = byte_alphabet()
    table = [b""] * (1 + max([*vocab.values(), *added], default=-1))
    for token, index in vocab.items():
        if family == "bytes":
            known = all(character in alphabet for character in token)
            table[index] = bytes(alphabet[character] for character in token) if known else token.encode()
        elif match := _BYTE_PIECE.fullmatch(token):
            table[index] = bytes([int(match.group(1), 16)])
        else:
            table[index] = token.replace("▁", " ").encode()
    for index, content in added.items():
        table[index] = content.encode()
    return table


class DecodeStream:
    """Turns ids into text as they come; the pieces joined equal `Tokenizer.decode` of all ids."""

    def __init__(self, table: list[bytes], skipped: frozenset[int], *, drop_space: bool) -> None:
        self._table = table
        self._skipped = skipped
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that became certain with `token_id`, often "" in the middle of a character.

        Raises: DataError for an id outside of the vocabulary.
        """
        return self._utf8.decode(self._bytes(token_id))

    def feed(self, ids: Iterable[int]) -> str:
        """Push all of `ids`; return their text."""
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        """Return what is left: U+FFFD if the ids ended in the middle of a character, else ""."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < len(self._table):
            raise DataError(
                f"token id {token_id} is outside of the tokenizer's vocabulary of {len(self._table)}; "
                "the ids come from another tokenizer or a padded vocabulary"
            )
        if token_id in self._skipped:
            return b""
        content = self._table[token_id]
        if self._drop_space and content:
            self._drop_space = False
            return content.removeprefix(b" ")
        return content

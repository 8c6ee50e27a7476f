r"""llama2.c's `tokenizer.bin`: the length of the longest token, then for each id its score, length and bytes.

All numbers are little-endian 32 bits wide (llama2.c, `tokenizer.py` and `run.c`). A space stands as a space, not as
sentencepiece's "▁"; id 0 is `<unk>`, ids 1 and 2 are written "\n<s>\n" and "\n</s>\n"; a byte piece is its name.
"""

import struct
from pathlib import Path
from typing import Any

from entrenar.data.tokenizer.sentencepiece import SPACE
from entrenar.data.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Vocabulary,
    tokenizer_files,
)
from entrenar.errors import FormatError

_CONTROL = {1: "<s>", 2: "</s>"}
_BYTE_NAMES = {f"<0x{byte:02X}>" for byte in range(256)}


def read_tokenizer_bin(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a `tokenizer.bin` as the content of `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        FormatError: naming file and token.
    """
    entries = read_tokens(path)
    texts: list[str] = []
    for index, (_, data) in enumerate(entries):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: token {index} is not UTF-8: {data!r}") from error
        texts.append(_CONTROL.get(index, text.replace(" ", SPACE)))
    has_bytes = set(texts) >= _BYTE_NAMES
    kinds = [BYTE if has_bytes and text in _BYTE_NAMES else NORMAL for text in texts]
    for index, kind in {0: UNKNOWN, 1: CONTROL, 2: CONTROL}.items():
        if index < len(kinds):
            kinds[index] = kind
    vocabulary = Vocabulary(
        tokens=texts,
        scores=[score for score, _ in entries],
        kinds=kinds,
        merges=[],
        pattern=None,
        bos_id=1,
        eos_id=2,
        pad_id=None,
        unk_id=0,
        add_bos=True,
        add_eos=False,
        adds_space=True,
        chat_template=None,
    )
    return tokenizer_files(vocabulary, str(path))


def read_tokens(path: Path) -> list[tuple[float, bytes]]:
    """Return score and bytes of each token as the file has them.

    Raises:
        FormatError: the file is cut, or a length is impossible.
    """
    data = path.read_bytes()
    if len(data) < 4:
        raise FormatError(f"{path} is no tokenizer.bin: it has {len(data)} bytes")
    (longest,) = struct.unpack_from("<I", data)
    entries: list[tuple[float, bytes]] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            raise FormatError(f"{path} ends in the middle of token {len(entries)}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(longest, len(data) - at):
            raise FormatError(
                f"{path}: token {len(entries)} claims {length} bytes, of {longest} at most and {len(data) - at} left"
            )
        entries.append((score, data[at : at + length]))
        at += length
    return entries

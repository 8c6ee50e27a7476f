"""Read a sentencepiece `.model` file and restate it as a `tokenizer.json` whose ids are the same for every string.

Why: LLaMA 1 and 2 (and llama2.c's small models) ship a sentencepiece model; everything else here speaks `tokenizers`.
The file is one protobuf message (sentencepiece_model.proto); the dozen fields that matter are read with the wire
format alone, so neither protobuf nor sentencepiece is needed to train, and a hostile file meets Python's bounds
checks.

The idea: sentencepiece's BPE merges, at each step, the adjacent pair whose joined piece has the highest score,
leftmost first among equals. `tokenizers` merges the pair of lowest rank, leftmost first. So every split of every
piece into two pieces becomes a merge and merges are ranked by falling score. Pieces of *equal* score (LLaMA 2's
sixteen runs of spaces) are ranked by falling length of the left part, which makes a run grow from its left end
exactly as sentencepiece's rule does.

Control, byte, unknown and unused pieces take part in no merge: text that spells them never becomes them.
"""

import base64
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE, _CHAR = 2, 4


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a sentencepiece file needed for encoding."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    model_type: int = 1
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    suffix_whitespace: bool = False
    charsmap: bytes = field(default=b"", repr=False)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a variable-length integer of more than 10 bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protobuf message; fixed-width values come as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}, which protobuf does not use here")
        if at + size > len(data):
            raise ValueError(f"field {number} claims {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("an integer field holds bytes")
    return value - (1 << 64) if value >> 63 else value


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = _signed(value)
    return text, score, kind


_TRAINER = {3: "model_type", 24: "suffix_whitespace", 35: "byte_fallback"} | {
    40: "unk_id",
    41: "bos_id",
    42: "eos_id",
    43: "pad_id",
}
_FLAGS = {"suffix_whitespace", "byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"}
_NORMALIZER = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def _settings(data: bytes, names: dict[int, str]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for number, value in _fields(data):
        name = names.get(number)
        if name == "charsmap":
            read[name] = value
        elif name in _FLAGS:
            read[name] = bool(value)
        elif name is not None:
            read[name] = _signed(value)
    return read


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read `path`.

    Raises: FormatError naming the file and the field.
    """
    data = path.read_bytes()
    pieces: list[tuple[str, float, int]] = []
    settings: dict[str, Any] = {}
    place = "the message"
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                place = f"pieces[{len(pieces)}]"
                pieces.append(_piece(value))
            elif number in (2, 3) and isinstance(value, bytes):
                place = "trainer_spec" if number == 2 else "normalizer_spec"
                settings |= _settings(value, _TRAINER if number == 2 else _NORMALIZER)
    except (IndexError, ValueError, TypeError) as error:
        reason = "it ends in the middle of a field" if isinstance(error, IndexError) else error
        raise FormatError(f"{path} is not a sentencepiece model: at {place}: {reason}") from error
    model = SentencePieceModel(pieces, **settings)
    _check(path, model)
    return model


def _check(path: Path, model: SentencePieceModel) -> None:
    if not model.pieces:
        raise FormatError(f"{path} is not a sentencepiece model: pieces: there are none")
    if model.model_type not in (_BPE, _CHAR):
        raise FormatError(
            f"{path}: trainer_spec.model_type must be 2 (BPE) or 4 (CHAR), got {model.model_type}; "
            "no LLaMA uses a unigram or word model"
        )
    if model.suffix_whitespace or not model.escape_whitespaces:
        raise FormatError(f"{path}: only models that write a space as a leading {SPACE!r} are supported")
    first: dict[str, int] = {}
    for index, (text, score, _) in enumerate(model.pieces):
        if not text or not math.isfinite(score):
            raise FormatError(f"{path}: pieces[{index}] must have text and a finite score, got {text!r} and {score}")
        if first.setdefault(text, index) != index:
            raise FormatError(f"{path}: pieces[{index}] repeats piece {first[text]}, {text!r}")
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        if getattr(model, name) >= len(model.pieces):
            raise FormatError(f"{path}: trainer_spec.{name} is {getattr(model, name)}, of {len(model.pieces)} pieces")
    if model.unk_id < 0 or model.pieces[model.unk_id][2] != _UNKNOWN:
        raise FormatError(f"{path}: trainer_spec.unk_id is {model.unk_id}, which is not a piece of type UNKNOWN")


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Rank every split of every piece; see the module's docstring for the order."""
    score = {text: score for text, score, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED)}
    ranked = [
        (-score[piece], -cut, piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [[left, right] for _, _, left, right in ranked]


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if model.remove_extra_whitespaces:
        # At the end sentencepiece strips the sign it writes for a space, also where the text itself had that sign.
        steps.append({"type": "Replace", "pattern": {"Regex": rf"{SPACE}+\z"}, "content": ""})
    return steps


def _added_token(index: int, text: str, kind: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **plain, "special": kind != _USER_DEFINED}


def _bos_template(model: SentencePieceModel) -> dict[str, Any] | None:
    """Build the tokenizer.json entry that puts BOS before a text; only other programs read it."""
    if model.bos_id < 0:
        return None
    bos = model.pieces[model.bos_id][0]
    mark, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [mark, text, *second],
        "special_tokens": tokens,
    }


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """Restate `model` in the layout of `tokenizer.json`."""
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, text, kind)
            for index, (text, _, kind) in enumerate(model.pieces)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": _bos_template(model),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {text: index for index, (text, _, _) in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def special_tokens(model: SentencePieceModel) -> dict[str, Any]:
    """Return what `tokenizer_config.json` would say of `model`."""
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id, "unk_token": model.unk_id}
    return {name: model.pieces[index][0] for name, index in named.items() if index >= 0}

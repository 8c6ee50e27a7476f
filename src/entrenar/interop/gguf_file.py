"""The container of a GGUF file: its metadata, where its tensors lie, and the number types read here.

Why not the `gguf` package's reader: it believes the counts in the header (a list that claims 2^60 entries keeps it busy
for ever) and needs the package to load a model. Here every length is checked against what is left of the file before
it is used. The package's reader remains the independent one that verifies written files.
Format: github.com/ggml-org/ggml, docs/gguf.md; block types: ggml-common.h.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from entrenar.errors import FormatError

MAGIC = b"GGUF"
# llama.cpp's own name of a part: gguf-split.cpp, SPLIT_PATH_FORMAT.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_F32, _F16, _Q4_0, _Q8_0, _BF16 = 0, 1, 2, 8, 30
_BLOCK = 32  # numbers of a block of Q8_0 or Q4_0
# numbers and bytes of a block
_TYPES = {_F32: (1, 4), _F16: (1, 2), _BF16: (1, 2), _Q8_0: (_BLOCK, 34), _Q4_0: (_BLOCK, 18)}
_DTYPES = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
TYPE_NAMES = {_F32: "F32", _F16: "F16", _BF16: "BF16", _Q8_0: "Q8_0", _Q4_0: "Q4_0"}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies; `shape` is in torch's order."""

    path: Path
    type: int
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file, or of all parts of a split one: the keys of the first, the tensors of all.

    Attributes:
        parts: the files, in order.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    parts: tuple[Path, ...]


class _Reader:
    """Reads a header, and knows how much of the file is left."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self.size = path.stat().st_size
        self.at = 0

    def bytes(self, count: int, field: str) -> bytes:
        if count > self.size - self.at:
            raise FormatError(f"{self._path}: {field} claims {count} bytes, {self.size - self.at} are left")
        self.at += count
        return self._stream.read(count)

    def number(self, code: str, field: str) -> Any:
        return struct.unpack(code, self.bytes(struct.calcsize(code), field))[0]

    def text(self, field: str) -> str:
        data = self.bytes(self.number("<Q", field), field)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._path}: {field} is not UTF-8: {data[:40]!r}") from error

    def value(self, kind: int, field: str) -> Any:
        if kind == _STRING:
            return self.text(field)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], field)
        if kind != _ARRAY:
            raise FormatError(f"{self._path}: {field} has type {kind}, which GGUF does not have")
        kind, count = self.number("<I", field), self.number("<Q", field)
        if kind == _STRING:
            if count * 8 > self.size - self.at:
                raise FormatError(f"{self._path}: {field} claims {count} strings, {self.size - self.at} bytes are left")
            return [self.text(field) for _ in range(count)]
        if kind not in _SCALARS:
            raise FormatError(f"{self._path}: {field} is a list of type {kind}, which is not read")
        data = self.bytes(count * struct.calcsize(_SCALARS[kind]), field)
        return [value for (value,) in struct.iter_unpack(_SCALARS[kind], data)]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a file, of versions 2 and 3, little-endian; of a split file, given by its first part.

    Raises:
        FormatError: naming file and field, or the part that is missing.
    """
    first = _read_part(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    name = _PART.fullmatch(path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != count or first.metadata.get("split.no", 0) != 0:
        raise FormatError(
            f"{path} is one of {count} parts; give the first, named like {path.stem.split('-0')[0]}-00001-of-"
            f"{count:05d}.gguf, with the others in its folder"
        )
    tensors, parts = dict(first.tensors), [path]
    for number in range(2, count + 1):
        part = path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise FormatError(f"{path} is the first of {count} parts, and {part.name} is not next to it")
        found = _read_part(part)
        twice = tensors.keys() & found.tensors.keys()
        if found.metadata.get("split.no") != number - 1 or twice:
            what = f"holds tensor {min(twice)} again" if twice else f"has split.no {found.metadata.get('split.no')!r}"
            raise FormatError(f"{part} {what}; it is not part {number} of {path.name}")
        tensors |= found.tensors
        parts.append(part)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FormatError(f"{path}: split.tensors.count is {total}, its {count} parts hold {len(tensors)}")
    return GGUFFile(path, first.metadata, tensors, tuple(parts))


def _read_part(path: Path) -> GGUFFile:
    """Read the header of one file.

    Raises:
        FormatError: naming file and field.
    """
    with path.open("rb") as stream:
        reader = _Reader(stream, path)
        if (magic := stream.read(4)) != MAGIC:
            raise FormatError(f"{path} is no GGUF file: it begins with {magic!r}")
        reader.at = 4
        version = reader.number("<I", "version")
        if version not in (2, 3):
            raise FormatError(f"{path}: version must be 2 or 3 (little-endian), got {version}")
        num_tensors, num_keys = reader.number("<Q", "tensor count"), reader.number("<Q", "key count")
        metadata: dict[str, Any] = {}
        for number in range(num_keys):
            key = reader.text(f"key {number}")
            if key in metadata:
                raise FormatError(f"{path}: key {key!r} is there twice")
            metadata[key] = reader.value(reader.number("<I", key), key)
        found: dict[str, GGUFTensor] = {}
        for number in range(num_tensors):
            name = reader.text(f"name of tensor {number}")
            if name in found:
                raise FormatError(f"{path}: tensor {name!r} is there twice")
            found[name] = _tensor(reader, name, path)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment must be a power of two, got {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    return GGUFFile(path, metadata, _placed(path, found, start, reader.size), (path,))


def _tensor(reader: _Reader, name: str, path: Path) -> GGUFTensor:
    num_dimensions = reader.number("<I", f"dimensions of {name}")
    if num_dimensions > _MAX_DIMENSIONS:
        raise FormatError(f"{path}: tensor {name} has {num_dimensions} dimensions, GGUF has at most {_MAX_DIMENSIONS}")
    sizes = [reader.number("<Q", f"dimensions of {name}") for _ in range(num_dimensions)]
    kind, offset = reader.number("<I", f"type of {name}"), reader.number("<Q", f"offset of {name}")
    if kind not in _TYPES:
        raise FormatError(
            f"{path}: tensor {name} is of GGML type {kind}; read are {', '.join(TYPE_NAMES.values())}: "
            "quantize the model again to one of them"
        )
    numbers, size = _TYPES[kind]
    if not sizes or sizes[0] % numbers:
        raise FormatError(f"{path}: tensor {name} has rows of {sizes[:1]}, no multiple of its blocks of {numbers}")
    return GGUFTensor(path, kind, tuple(reversed(sizes)), offset, math.prod(sizes) // numbers * size)


def _placed(path: Path, found: Mapping[str, GGUFTensor], start: int, size: int) -> dict[str, GGUFTensor]:
    """Return the tensors with their offset in the file, checked for bounds and overlaps."""
    placed = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}
    end, before = start, ""
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise FormatError(f"{path}: tensor {name} begins at byte {tensor.offset}, inside of tensor {before}")
        end, before = tensor.offset + tensor.size_bytes, name
        if end > size:
            raise FormatError(f"{path}: tensor {name} ends at byte {end}, the file has {size}")
    return placed


def read_gguf_tensor(tensor: GGUFTensor) -> Tensor:
    """Return a tensor's numbers: float32, float16 or bfloat16 as stored, float32 for the block types."""
    data = np.fromfile(tensor.path, np.uint8, tensor.size_bytes, offset=tensor.offset)
    if tensor.type == _Q8_0:
        values = dequantize_q8_0(data)
    elif tensor.type == _Q4_0:
        values = dequantize_q4_0(data)
    else:
        return torch.from_numpy(data).view(stored_dtype(tensor)).view(tensor.shape)
    return torch.from_numpy(values).view(tensor.shape)


def stored_dtype(tensor: GGUFTensor) -> torch.dtype:
    """Return the dtype in which `read_gguf_tensor` gives a tensor."""
    return _DTYPES.get(tensor.type, torch.float32)


def dequantize_q8_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Blocks of a float16 scale d and 32 int8 numbers q: the values are d·q."""
    blocks = data.reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scales


def dequantize_q4_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Blocks of a float16 scale d and 16 bytes: the values are d·(q - 8), low halves of the bytes first."""
    blocks = data.reshape(-1, 18)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    halves = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1)
    return (halves.astype(np.float32) - 8) * scales

"""One safetensors file, read tensor by tensor: checked first, then mapped or cast through one buffer.

The library checks the header (overlaps, gaps, sizes, bounds). What it does not check is checked here: the dtype, and
that no weight is NaN or infinite. Format: the README of github.com/huggingface/safetensors.
"""

import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.files import explained_disk_errors
from entrenar.model.streaming import give_back

_BLOCK_BYTES = 1 << 20
_CHECKED_AT_ONCE = 1 << 16
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {"U8": torch.uint8, "I8": torch.int8}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path, *, has_codes: bool = False) -> Mapping[str, Entry]:
    """Return what a file holds: weights, and codes of quantized ones where there may be some.

    Raises:
        FormatError: it is not a valid safetensors file, or a tensor is of a dtype that no weight has.
    """
    try:
        with safe_open(path, framework="pt"):  # the library's own checks
            pass
        with path.open("rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise FormatError(f"{path} is not a valid safetensors file: {error}") from error
    header.pop("__metadata__", None)
    known = _DTYPES | (_CODES if has_codes else {})
    foreign = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in known}
    for name, dtype in foreign.items():
        raise FormatError(f"{path}: tensor {name} has dtype {dtype}; weights are one of {', '.join(known)}")
    start = 8 + header_size
    return MappingProxyType(
        {
            name: Entry(known[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    )


class TensorReader:
    """Reads tensors: as they lie in the file through a private memory map, otherwise through one buffer.

    A map costs no copy and its pages belong to the page cache, but they count as the process's memory until the file is
    closed: a cast through a map would hold the model twice. The buffer lives as long as the reader, since many
    short-lived ones would riddle the heap.
    """

    def __init__(self) -> None:
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._maps: dict[Path, Any] = {}

    def read(
        self, path: Path, name: str, entry: Entry, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Read one tensor as `dtype`, with no more memory than the result and the buffer.

        Raises:
            FormatError: the file ends too early, or a number is NaN or infinite, or becomes so as `dtype`.
        """
        if entry.dtype == dtype and torch.empty(0, device=device).device.type == "cpu":
            return self._mapped(path, name)
        result = torch.empty(entry.shape, dtype=dtype, device=device)
        if not self._staging.numel():
            self._staging = torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
        staging = self._staging.view(entry.dtype)
        with path.open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            for start in range(0, result.numel(), len(staging)):
                part = result.view(-1)[start : start + len(staging)]
                block = staging[: len(part)]
                _fill(stream, block, path, name)
                if not is_finite(block):
                    raise FormatError(f"{path}: tensor {name} holds NaN or infinite weights")
                part.copy_(block)
                if not is_finite(part):
                    raise FormatError(f"{path}: tensor {name} holds weights beyond {dtype}; load it as bfloat16")
        return result

    def _mapped(self, path: Path, name: str) -> Tensor:
        try:
            if path not in self._maps:
                self._maps[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._maps[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is not a valid safetensors file: {error}") from error
        if not is_finite(tensor):
            raise FormatError(f"{path}: tensor {name} holds NaN or infinite weights")
        give_back(tensor)  # checked, and perhaps not used for long
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite: NaN and infinity set all exponent bits; whole numbers are always finite.

    With numpy, a block in cache at a time: torch would wake its threads for each, which on a busy machine costs more
    than the reading (37 of the 40 s of a 1b model's load).
    """
    if not tensor.is_floating_point():
        return True
    if tensor.device.type != "cpu":
        return bool(tensor.isfinite().all())
    integer, exponent = _EXPONENTS[tensor.dtype]
    bits = tensor.detach().reshape(-1).view(integer).numpy()
    blocks = (bits[start : start + _CHECKED_AT_ONCE] for start in range(0, len(bits), _CHECKED_AT_ONCE))
    return not any(((block & exponent) == exponent).any() for block in blocks)


def _fill(stream: io.FileIO, block: Tensor, path: Path, name: str) -> None:
    view = block.view(torch.uint8).numpy().data
    while view:
        count = stream.readinto(view)
        if not count:
            raise FormatError(f"{path} ends in the middle of tensor {name}; was it changed while it was read?")
        view = view[count:]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file.

    Raises:
        DiskFullError, MachineError: the disk refuses.
    """
    with explained_disk_errors(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(dict(tensors), path, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library gives the system's error as text only.
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), str(error)) from error
            raise
        path.chmod(mode)  # the library's own lets no one else read the file

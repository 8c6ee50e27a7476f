"""From any format to any other, each written file proved before it gets its name.

A file is written beside its place, verified there (`verify`), and renamed; a conversion that fails, or whose measured
loss is over a threshold of the user's, leaves nothing behind.
"""

import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.errors import ConfigError, DataError, FormatError, GateFailed
from entrenar.files import TEMPORARY_PREFIX, atomic_directory, fsync_directory, fsync_file
from entrenar.interop import gguf_file, hf, llama2c
from entrenar.interop.gguf import GGUFType, load_gguf, save_gguf
from entrenar.interop.proof import numpy_llama, readback
from entrenar.interop.proof.bounds import Format, bound_of, bound_of_rounded
from entrenar.interop.proof.numpy_llama import Array
from entrenar.interop.proof.verify import Origin, Report, origin_of, verify
from entrenar.interop.safetensors_file import TensorReader
from entrenar.interop.tokenizers import tokenizer_bin
from entrenar.model import Llama
from entrenar.peft import QuantizeConfig, widen

_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ALLOWED: dict[Format, tuple[str, ...]] = {
    "hf": ("f32", "f16", "bf16"),
    "llama2c": ("f32", "q8_0"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "nf4": ("f32", "f16", "bf16"),
    "nf-bits": ("f32", "f16", "bf16"),
}
MODEL_BIN, _TOKENIZER_BIN = "model.bin", "tokenizer.bin"


@dataclass(frozen=True)
class Rounded:
    """A model whose matrices are in few bits, and how many a weight takes, all included."""

    model: Llama
    bits: float


@dataclass(frozen=True)
class Source:
    """A model and where it came from.

    Attributes:
        rounded: the same model, its matrices rounded to a budget: this is what nf-bits writes.
        folder: where its weights are read from one by one, if they are not in memory: the model is then without.
        is_rounded: whether the weights were in few bits where they came from.
    """

    model: Llama
    tokenizer: Tokenizer | None
    format: Format
    folder: Path | None = None
    rounded: Rounded | None = None
    is_rounded: bool = False

    def origin(self) -> Origin:
        """Return what a written file is compared with."""
        return origin_of(self.model) if self.folder is None else _origin_in(self.folder)


@dataclass(frozen=True)
class Threshold:
    """A measured value that makes a conversion fail, like `kl>0.01`."""

    metric: str
    is_above: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> "Threshold":
        """Read `METRIC>NUMBER` or `METRIC<NUMBER`.

        Raises:
            ConfigError.
        """
        names = ("kl", "max_kl", "dlogit", "top1", "tensor_error")
        match = re.fullmatch(rf"\s*({'|'.join(names)})\s*([<>])\s*([-+.0-9eE]+)\s*", text)
        try:
            if match is not None:
                return cls(match[1], match[2] == ">", float(match[3]))
        except ValueError:
            pass
        raise ConfigError(f"--refuse-if must be one of {', '.join(names)}, then > or <, then a number, got {text!r}")

    def check(self, report: Report) -> None:
        """Compare.

        Raises:
            GateFailed.
        """
        found = report.metrics[self.metric]
        if found > self.value if self.is_above else found < self.value:
            sign = ">" if self.is_above else "<"
            raise GateFailed(f"{self.metric} is {found:.3g}, refused if {sign} {self.value:g}; nothing was written")


def detect(path: Path) -> Format:
    """Tell the format of a file or folder by its content.

    Raises:
        DataError: nothing is there; FormatError: it is none of them.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return "hf"
        if (path / MODEL_BIN).is_file():
            return "llama2c"
        raise FormatError(f"{path} is no model folder: it has neither config.json nor {MODEL_BIN}")
    if not path.is_file():
        raise DataError(f"no model at {path}: give a Hugging Face folder, a .gguf or a llama2.c .bin")
    with path.open("rb") as stream:
        head = stream.read(10)
    # a pickle begins with 80 and its protocol, then an opcode; a llama2.c file of dim 128 with 80 00 00 00
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[2:3] != b"\0"):
        raise FormatError(
            f"{path} is a pickle, which can run code when it is read; convert it where you trust it, "
            "with transformers' save_pretrained"
        )
    if head[8:] == b'{"':
        raise FormatError(f"{path} is a part of a Hugging Face folder; give the folder, {path.parent}")
    return "gguf" if head[:4] == gguf_file.MAGIC else "llama2c"


def open_source(path: Path, tokenizer: Path | None = None, *, is_streamed: bool = False) -> Source:
    """Load a model of any format with its tokenizer: `tokenizer`, else the one in it or beside it.

    Four bits are widened. With `is_streamed` the weights of a model folder stay there.

    Raises:
        DataError, FormatError.
    """
    kind = detect(path)
    found = None if tokenizer is None else Tokenizer.load(tokenizer)
    if kind == "gguf":
        model, own = load_gguf(path)
        return Source(model, found or own, kind)
    if kind == "hf":
        is_rounded = hf.is_quantized(path)
        if is_streamed:
            model, places, _ = hf.open_folder(path)
            model.to(hf.widest_dtype(places))
            return Source(model, found or _tokenizer_in(path), kind, path, is_rounded=is_rounded)
        model = hf.load_model(path)
        widen(model)
        return Source(model, found or _tokenizer_in(path), kind, is_rounded=is_rounded)
    file = path / MODEL_BIN if path.is_dir() else path
    return Source(llama2c.load_llama2c(file), found or _tokenizer_in(file.parent), kind)


def _origin_in(folder: Path) -> Origin:
    model, places, _ = hf.open_folder(folder)
    readback_of_source = readback.read_hf_folder(folder, model.config)

    def weight(name: str) -> Tensor:
        path, entry = places[name][""]
        return TensorReader().read(path, name, entry, entry.dtype)

    def logits(input_ids: Tensor) -> Array:
        return numpy_llama.logits(readback_of_source.weight, readback_of_source.shape, input_ids.numpy())

    return Origin(model.config, [name for name, _ in model.named_parameters()], weight, logits)


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer.bin"))
    return Tokenizer.load(folder) if has_one or len(list(folder.glob("*.model"))) == 1 else None


@dataclass(frozen=True)
class Target:
    """Where to write what.

    Attributes:
        llama2c_version: how float32 is laid out for llama2.c: 0 is what its program run.c reads.
        held: what of an nf4 folder is in few bits beside the projections.
    """

    path: Path
    format: Format
    dtype: str | None = None
    can_overwrite: bool = False
    accepts_tokenizer_differences: bool = False
    llama2c_version: Literal[0, 1] = 0
    held: QuantizeConfig = field(default_factory=QuantizeConfig)

    def dtype_for(self, model: Llama) -> str:
        """Return the dtype to write, the model's own where none was asked for and the format has it.

        Raises:
            ConfigError.
        """
        allowed = _ALLOWED[self.format]
        if self.dtype is not None:
            if self.dtype not in allowed:
                raise ConfigError(f"--dtype for {self.format} must be one of {', '.join(allowed)}, got {self.dtype!r}")
            return self.dtype
        own = next(name for name, dtype in _DTYPES.items() if dtype == model.model.embed_tokens.weight.dtype)
        return own if own in allowed else "f32"


def check_target(source: Source, target: Target) -> None:
    """Check that the target may be written, and that its numbers would not be rounded twice.

    Raises:
        ConfigError: something is there that may not be replaced; FormatError: it is no model.
    """
    if target.format in ("nf4", "nf-bits") and source.is_rounded:
        raise ConfigError(
            "the source is quantized already, and quantizing it again would add a second error to the first; "
            "convert the original weights, or accept it by way of `entrenar convert SRC DIR --to hf`"
        )
    is_used = target.path.is_file() or (target.path.is_dir() and any(target.path.iterdir()))
    if is_used and not target.can_overwrite:
        raise ConfigError(f"{target.path} exists; name another place or give --overwrite")
    if target.path.is_dir() == (target.format == "gguf") and target.path.exists():
        kind = "folder" if target.format == "gguf" else "file"
        raise ConfigError(f"{target.path} is a {kind}, {target.format} is not; name another place")
    if is_used and target.path.is_dir():
        detect(target.path)  # only a model is replaced by one


def convert(source: Source, target: Target, refuse_if: Sequence[Threshold] = ()) -> Report:
    """Write `source` to `target`, verified.

    Raises:
        GateFailed: the file is not what it should be, or over a threshold; nothing is left.
        ConfigError, FormatError, DiskFullError, MachineError.
    """
    dtype = target.dtype_for(source.model)
    check_target(source, target)
    if (target.format == "nf-bits") != (source.rounded is not None):
        raise ConfigError("a model that was rounded to a budget of bits is written as nf-bits, and no other is")
    with (_atomic_file if target.format == "gguf" else atomic_directory)(target.path) as place:
        _write(source, place, target, dtype)
        bound = bound_of(dtype, target.format, source.model.config, target.held)
        if source.rounded is not None:
            bound = bound_of_rounded(source.rounded.model)
        report = verify(_read_back(place, target.format, source.model), source.origin(), source.tokenizer, bound)
        if report.differing_strings and not target.accepts_tokenizer_differences:
            differing = f"{len(report.differing_strings)} of {report.num_strings} strings"
            raise GateFailed(
                f"the file's tokenizer gives {differing} other ids, {report.differing_strings[0]!r} first; "
                "nothing was written (--accept-tokenizer-differences writes it nevertheless)"
            )
        for threshold in refuse_if:
            threshold.check(report)
    return report


def _write(source: Source, place: Path, target: Target, dtype: str) -> None:
    model, tokenizer, origin = source.model, source.tokenizer, source.origin()
    if target.format in ("nf4", "nf-bits"):
        if source.rounded is not None:
            hf.save_widths(place, source.rounded.model, source.rounded.bits)
        else:
            named = ((name, origin.weight(name)) for name in origin.names)
            hf.save_quantized(place, model.config, named, _DTYPES[dtype], held=target.held)
        if tokenizer is not None:
            tokenizer.save(place)
        return
    weights = {name: origin.weight(name) for name in origin.names}
    if target.format == "gguf":
        name = target.path.stem
        save_gguf(place, model.config, weights, tokenizer, type_name=_gguf_type(dtype), model_name=name)
    elif target.format == "hf":
        hf.save_model(place, model.config, {name: weight.to(_DTYPES[dtype]) for name, weight in weights.items()})
        if tokenizer is not None:
            tokenizer.save(place)
    else:
        version = 2 if dtype == "q8_0" else target.llama2c_version
        llama2c.save_llama2c(place / MODEL_BIN, model.config, weights, version=version)
        if tokenizer is not None:
            (place / _TOKENIZER_BIN).write_bytes(tokenizer_bin(tokenizer, model.config.vocab_size))


def _gguf_type(dtype: str) -> GGUFType:
    return next(name for name in get_args(GGUFType) if name == dtype)


def _read_back(place: Path, kind: Format, model: Llama) -> readback.Readback:
    readers = {
        "hf": readback.read_hf_folder,
        "nf4": readback.read_hf_folder,
        "nf-bits": readback.read_hf_folder,
        "gguf": readback.read_gguf_file,
        "llama2c": readback.read_llama2c_folder,
    }
    return readers[kind](place, model.config)


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)

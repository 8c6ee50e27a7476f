"""From any format to any other, each written file proved before it gets its name.

A file is written next to its place, verified there (`verify`), and renamed; a conversion that fails, or whose measured
loss is over a threshold of the user's, leaves nothing behind.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from entrenar.errors import ConfigError, GateFailed
from entrenar.files import atomic_directory, atomic_file
from entrenar.interop import hf, llama2c
from entrenar.interop.formats import Format
from entrenar.interop.generation_config import write_generation_config
from entrenar.interop.gguf import GGUFType, save_gguf
from entrenar.interop.proof.bounds import Bound, bound_of, bound_of_rounded, bound_of_widened
from entrenar.interop.proof.verify import Report, verify
from entrenar.interop.source import MODEL_BIN, READERS, Source, detect
from entrenar.interop.tokenizers import tokenizer_bin
from entrenar.model import Llama
from entrenar.peft import QuantizeConfig

_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ALLOWED: dict[Format, tuple[str, ...]] = {
    "hf": ("f32", "f16", "bf16"),
    "llama2c": ("f32", "q8_0"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "nf4": ("f32", "f16", "bf16"),
    "nf-bits": ("f32", "f16", "bf16"),
}
_TOKENIZER_BIN = "tokenizer.bin"


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


@dataclass(frozen=True)
class Target:
    """Where to write what.

    Attributes:
        llama2c_version: how float32 is laid out for llama2.c: 0 is what its program run.c reads.
        held: which weights of an nf4 folder are quantized in addition to the projections.
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
        ConfigError: the target exists and may not be replaced; FormatError: the source is not a model.
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
    with (atomic_file if target.format == "gguf" else atomic_directory)(target.path) as place:
        _write(source, place, target, dtype)
        readback = READERS[target.format](place)
        report = verify(readback, source.origin(), source.tokenizer, _bound(source, target, dtype))
        if report.differing_strings and not target.accepts_tokenizer_differences:
            differing = f"{len(report.differing_strings)} of {report.num_strings} strings"
            raise GateFailed(
                f"the file's tokenizer gives {differing} other ids, {report.differing_strings[0]!r} first; "
                "nothing was written (--accept-tokenizer-differences writes it nevertheless)"
            )
        for threshold in refuse_if:
            threshold.check(report)
    return report


def _bound(source: Source, target: Target, dtype: str) -> Bound:
    if source.rounded is not None:
        return bound_of_rounded(source.rounded.model)
    # A folder keeps each weight's own dtype unless another is asked for.
    is_kept = target.format == "hf" and target.dtype is None
    bound = bound_of("f32" if is_kept else dtype, target.format, source.model.config, target.held)
    return bound_of_widened(bound, source.model.dtype) if source.is_rounded else bound


def _write(source: Source, place: Path, target: Target, dtype: str) -> None:
    model, tokenizer, weight = source.model, source.tokenizer, source.reader()
    if target.format in ("nf4", "nf-bits"):
        if source.rounded is not None:
            hf.save_widths(place, source.rounded.model, source.rounded.bits)
        else:
            named = ((name, weight(name)) for name in source.names())
            hf.save_quantized(place, model.config, named, _DTYPES[dtype], held=target.held)
            write_generation_config(place, model.config, model.generation)
        if tokenizer is not None:
            tokenizer.save(place)
        return
    weights = {name: weight(name) for name in source.names()}
    if target.format == "gguf":
        name = target.path.stem
        save_gguf(place, model.config, weights, tokenizer, type_name=_gguf_type(dtype), model_name=name)
    elif target.format == "hf":
        if target.dtype is not None:
            weights = {name: tensor.to(_DTYPES[dtype]) for name, tensor in weights.items()}
        hf.save_model(place, model.config, weights, generation=model.generation)
        if tokenizer is not None:
            tokenizer.save(place)
    else:
        version = 2 if dtype == "q8_0" else target.llama2c_version
        llama2c.save_llama2c(place / MODEL_BIN, model.config, weights, version=version)
        if tokenizer is not None:
            (place / _TOKENIZER_BIN).write_bytes(tokenizer_bin(tokenizer, model.config.vocab_size))


def _gguf_type(dtype: str) -> GGUFType:
    return next(name for name in get_args(GGUFType) if name == dtype)

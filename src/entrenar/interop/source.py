"""A model to be converted, of any format: the one that is in a file, and the one that we read from it.

What is written comes from the second; what the written file is compared with comes from the first, by the readers of
`proof`, so that an error in reading is found like an error in writing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.errors import DataError, FormatError
from entrenar.interop import gguf_file, hf, llama2c
from entrenar.interop.formats import Format
from entrenar.interop.gguf import load_gguf
from entrenar.interop.proof import read_gguf, read_hf, read_llama2c
from entrenar.interop.proof.readback import Readback
from entrenar.interop.proof.verify import Origin, origin_in, origin_of
from entrenar.interop.safetensors_file import TensorReader
from entrenar.model import Llama
from entrenar.peft import widen

MODEL_BIN = "model.bin"
READERS: Mapping[Format, Callable[[Path], Readback]] = {
    "hf": read_hf.read_hf_folder,
    "nf4": read_hf.read_hf_folder,
    "nf-bits": read_hf.read_hf_folder,
    "gguf": read_gguf.read_gguf_file,
    "llama2c": read_llama2c.read_llama2c,
}


@dataclass(frozen=True)
class Rounded:
    """A model whose matrices are in few bits, and how many a weight takes, all included."""

    model: Llama
    bits: float


@dataclass(frozen=True)
class Source:
    """A model and where it came from.

    Attributes:
        path: the file or folder it was read from; None for a model that was made in memory.
        is_streamed: its weights are read from the folder one by one: the model is then without.
        rounded: the same model, its matrices rounded to a budget: this is what nf-bits writes.
        is_rounded: whether the weights were quantized where they came from.
    """

    model: Llama
    tokenizer: Tokenizer | None
    format: Format
    path: Path | None = None
    is_streamed: bool = False
    rounded: Rounded | None = None
    is_rounded: bool = False

    def names(self) -> list[str]:
        """Return the names of the weights."""
        return [name for name, _ in self.model.named_parameters()]

    def reader(self) -> Callable[[str], Tensor]:
        """Return what gives the weights to write, by name."""
        if not self.is_streamed or self.path is None:
            return {name: weight.detach().cpu() for name, weight in self.model.named_parameters()}.__getitem__
        _, places, _ = hf.open_folder(self.path)

        def weight(name: str) -> Tensor:
            file, entry = places[name][""]
            return TensorReader().read(file, name, entry, entry.dtype)

        return weight

    def origin(self) -> Origin:
        """Return what a written file is compared with: the source's own file, if there is one."""
        if self.path is None:
            return origin_of(self.model)
        return origin_in(READERS[self.format](self.path), self.model.config, self.names())


def detect(path: Path) -> Format:
    """Return the format of a file or folder, by its content.

    Raises:
        DataError: nothing is there; FormatError: it is none of them.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return "hf"
        if (path / MODEL_BIN).is_file():
            return "llama2c"
        raise FormatError(f"{path} is not a model folder: it has neither config.json nor {MODEL_BIN}")
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
    is_gguf = head[:4] == gguf_file.MAGIC
    if path.suffix == ".gguf" and not is_gguf:
        raise FormatError(f"{path} is no GGUF file: it begins with {head[:4]!r}; it is damaged, or misnamed")
    return "gguf" if is_gguf else "llama2c"


def open_source(path: Path, tokenizer: Path | None = None, *, is_streamed: bool = False) -> Source:
    """Load a model of any format with a tokenizer: `tokenizer`, else the one stored in the model or next to it.

    Four bits are widened. With `is_streamed` the weights of a model folder stay there.

    Raises:
        DataError, FormatError.
    """
    kind = detect(path)
    found = None if tokenizer is None else Tokenizer.load(tokenizer)
    if kind == "gguf":
        model, own = load_gguf(path)
        return Source(model, found or own, kind, path)
    if kind == "hf":
        is_rounded = hf.is_quantized(path)
        if is_streamed:
            model, places, _ = hf.open_folder(path)
            model.to(hf.widest_dtype(places))
            return Source(model, found or _tokenizer_in(path), kind, path, is_streamed=True, is_rounded=is_rounded)
        model = hf.load_model(path)
        widen(model)
        return Source(model, found or _tokenizer_in(path), kind, path, is_rounded=is_rounded)
    file = path / MODEL_BIN if path.is_dir() else path
    return Source(llama2c.load_llama2c(file), found or _tokenizer_in(file.parent), kind, path)


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer.bin"))
    return Tokenizer.load(folder) if has_one or len(list(folder.glob("*.model"))) == 1 else None

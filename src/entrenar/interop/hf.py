"""Hugging Face model folders: `config.json` and safetensors, in one file or in shards with an index.

Weight names are Hugging Face's own, so a tensor goes from file to parameter as it is. Loading is tensor by tensor into
a model that was built without storage, so the peak is the model and one block of a tensor. Format: safetensors' README
and the `model.safetensors.index.json` of transformers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.files import read_json, write_json
from entrenar.interop.assemble import set_parameter
from entrenar.interop.safetensors_file import Entry, TensorReader, read_header, write_tensors
from entrenar.model import Llama, LlamaConfig

HEAD = "lm_head.weight"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# Written by old exports of transformers; they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> LlamaConfig:
    """Read `config.json` of a model folder.

    Raises:
        FormatError: there is none, or it does not describe a LLaMA.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} is not a model folder: it has no config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(values).__name__}")
    try:
        return LlamaConfig.from_hf(values)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def save_model(
    folder: Path, config: LlamaConfig, weights: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `config.json` and the weights into an existing folder; `weights` is a `Llama` state dict.

    Weight files of an earlier save that this one does not replace are removed: a reader would mix the two.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    dtype = next(iter(tensors.values())).dtype
    shards = list(_shards(tensors, max_shard_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    kept = set(names)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        kept.add(INDEX_FILE)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in kept:
            old.unlink(missing_ok=True)
    write_json(folder / "config.json", config.to_hf(dtype))


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Llama:
    """Load a model folder; without `dtype` in that of its file, the widest one where a file mixes them.

    Raises:
        FormatError: a file is missing, damaged, or disagrees with config.json.
    """
    config = read_config(folder)
    found = {name: place for name, place in read_entries(folder).items() if not name.endswith(_DERIVED)}
    if len(found) < config.num_layers:  # before a hostile config.json makes us build a billion layers
        raise FormatError(f"{folder} holds {len(found)} tensors; config.json: num_hidden_layers is {config.num_layers}")
    with torch.device("meta"):
        model = Llama(config)
    model.eval()
    wanted = dict(model.named_parameters())
    tied_head = found.pop(HEAD, None) if config.tie_word_embeddings else None
    for name, (path, entry) in found.items():
        if name not in wanted:
            raise FormatError(f"{path} holds tensor {name}, which the architecture in config.json does not have")
        if entry.shape != wanted[name].shape:
            raise FormatError(
                f"{path}: tensor {name} has shape {entry.shape}, config.json asks for {tuple(wanted[name].shape)}"
            )
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} first")
    if dtype is None:
        dtype = _widest(entry.dtype for _, entry in found.values())
    reader = TensorReader()
    for name, (path, entry) in found.items():
        set_parameter(model, name, reader.read(path, name, entry, dtype, device))
    if tied_head is not None:
        _check_tied(model, *tied_head)
    return model


def _widest(dtypes: Iterator[torch.dtype]) -> torch.dtype:
    widest = next(dtypes)
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _check_tied(model: Llama, path: Path, entry: Entry) -> None:
    embedding = model.model.embed_tokens.weight
    head = TensorReader().read(path, HEAD, entry, embedding.dtype, embedding.device)
    if head.shape != embedding.shape or not torch.equal(embedding, head):
        raise FormatError(f"{path}: {HEAD} differs from the embedding, but config.json ties them")


def read_entries(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Return the file and the place in it of every tensor in a model folder; no weight is read.

    Raises:
        FormatError: a file is missing, damaged, or pickled, or the index disagrees with the shards.
    """
    entries: dict[str, tuple[Path, Entry]] = {}
    for path, names in _weight_files(folder).items():
        if not path.is_file():
            raise FormatError(f"{folder} lacks the shard {path.name}, which {INDEX_FILE} names")
        header = read_header(path)
        for name in names or ():
            if name not in header:
                raise FormatError(f"{path} lacks tensor {name}, which {INDEX_FILE} places in it")
        for name, entry in header.items():
            if names is not None and name not in names:
                raise FormatError(f"{path} holds tensor {name}, which {INDEX_FILE} does not place in it")
            entries[name] = (path, entry)
    return entries


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Map each weight file to the tensors to read from it; None means all of them."""
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{folder / INDEX_FILE} must hold a weight_map from tensor to file")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(
                    f"{folder / INDEX_FILE} places {name} in {file!r}, which is no file name in this folder"
                )
            files.setdefault(folder / file, set()).add(name)
        return dict(files)
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise FormatError(
            f"{folder} holds pickled weights ({pickles[0].name}), which can run code when they are read; convert them "
            "where you trust them, with transformers' save_pretrained(safe_serialization=True)"
        )
    raise FormatError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")

"""Hugging Face model folders: `config.json` and safetensors, in one file or in shards with an index.

Weight names are Hugging Face's own, so a tensor goes from file to parameter as it is. Loading is tensor by tensor into
a model that was built without storage, so the peak is the model and one block of a tensor. Format: safetensors' README
and the `model.safetensors.index.json` of transformers. Projections in four bits are laid out as `bnb` says,
matrices of any width as `bits` does.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from entrenar.errors import ConfigError, FormatError
from entrenar.files import TEMPORARY_PREFIX, read_json, write_json
from entrenar.interop import bits, bnb
from entrenar.interop.assemble import set_parameter
from entrenar.interop.safetensors_file import Entry, TensorReader, read_header, write_tensors
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import Int8Weight, Nf4Weight, NfBitsWeight, QuantizedWeight
from entrenar.peft import QuantizeConfig, kinds_held, put_quantized, quantized_projections
from entrenar.peft import quantize as quantize_weight
from entrenar.peft.quantize import EMBEDDING, HEAD, weights_held

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# What is held while a model is quantized, beside one weight.
MAX_QUANTIZED_SHARD_BYTES = 2 * 10**8
# Written by old exports of transformers; they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> LlamaConfig:
    """Read `config.json` of a model folder.

    Raises:
        FormatError: there is none, or it does not describe a LLaMA.
    """
    values = _config_values(folder)
    try:
        return LlamaConfig.from_hf(values)
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from error


def is_quantized(folder: Path) -> bool:
    """Say whether a model folder's projections are in four bits, or its matrices in some other few.

    Raises:
        FormatError: there is no model, or one in another quantization.
    """
    values, path = _config_values(folder), folder / "config.json"
    config = values.get(bnb.CONFIG_KEY)
    if isinstance(config, dict) and config.get("quant_method") == bits.METHOD:
        bits.check_config(config, path)
        return True
    return bnb.check_config(values, path)


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} is not a model folder: it has no config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def save_model(
    folder: Path, config: LlamaConfig, weights: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `config.json` and the weights into an existing folder; `weights` is a `Llama` state dict.

    Weight files of an earlier save that this one does not replace are removed: a reader would mix the two.
    """
    tensors = ((name, weights[name].detach().contiguous().cpu()) for name in weights)
    dtype = next(iter(weights.values())).dtype
    _write_shards(folder, tensors, max_shard_bytes)
    write_json(folder / "config.json", config.to_hf(dtype))


def save_quantized(
    folder: Path,
    config: LlamaConfig,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    held: QuantizeConfig | None = None,
    max_shard_bytes: int = MAX_QUANTIZED_SHARD_BYTES,
) -> None:
    """Quantize the projections among `weights` one by one and write them as bitsandbytes does, the rest as `dtype`.

    `held` says how embedding and head are held. No more is held than a tensor and a shard.

    Raises:
        DataError: a weight is NaN or infinite.
        ConfigError: a head that is the embedding is asked to be held otherwise.
    """
    held = held or QuantizeConfig()
    held.check_tied(is_tied=config.tie_word_embeddings)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            kind = held.kind_of(name)
            if kind != "keep":
                packed = cast(Nf4Weight | Int8Weight, quantize_weight(name, weight, kind))
                yield from bnb.pack(name, packed, dtype).items()
            else:
                yield name, weight.detach().to("cpu", dtype).contiguous()

    _write_shards(folder, tensors(), max_shard_bytes)
    announced = bnb.quantization_config(dtype, held, is_tied=config.tie_word_embeddings)
    write_json(folder / "config.json", config.to_hf(dtype) | {bnb.CONFIG_KEY: announced})


def save_widths(folder: Path, model: Llama, total_bits: float) -> None:
    """Write a model whose matrices are held in few bits, as `bits` lays them out; the rest as it is."""
    held: dict[str, NfBitsWeight] = {}
    for name, module in quantized_projections(model):
        held[name.removesuffix(".table")] = cast(NfBitsWeight, module.quantized)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in held.items():
            yield from bits.pack(f"{name}.weight", weight).items()
        for name, parameter in model.named_parameters():
            yield name, parameter.detach().cpu().contiguous()

    _write_shards(folder, tensors(), MAX_QUANTIZED_SHARD_BYTES)
    announced = {bnb.CONFIG_KEY: bits.quantization_config(held, total_bits)}
    write_json(folder / "config.json", model.config.to_hf(model.dtype) | announced)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write weights in files of at most some size, and an index where there are several."""
    files: list[Path] = []
    held: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        files.append(folder / f"{TEMPORARY_PREFIX}shard-{len(files)}")
        write_tensors(files[-1], shard)
        held.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [WEIGHTS_FILE]
    kept = set(names)
    for name, file in zip(names, files, strict=True):
        file.replace(folder / name)
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(names, held, strict=True) for name in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        kept.add(INDEX_FILE)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: bool = False,
    held: QuantizeConfig | None = None,
) -> Llama:
    """Load a model folder; without `dtype` in that of its file, the widest one where a file mixes them.

    A quantized folder stays quantized; with `quantize` the projections of a plain one are, one by one while they are
    read and from the numbers in the file, and embedding and head as `held` says. `dtype` is then that of the rest.

    Raises:
        FormatError: a file is missing, damaged, or disagrees with config.json.
        ConfigError: embedding or head cannot be held as asked.
    """
    model, places, is_packed = open_folder(folder)
    held = held or QuantizeConfig()
    held.check_tied(is_tied=model.config.tie_word_embeddings)
    if dtype is None:
        dtype = widest_dtype(places)
    reader = TensorReader()
    for name, parts in places.items():
        owner, path = name.removesuffix(".weight"), next(iter(parts.values()))[0]
        kind = held.kind_of(name) if quantize and not (is_packed and bnb.is_quantized(name)) else "keep"
        if len(parts) > 1:
            put_quantized(model, owner, _read_quantized(model, name, parts, reader), dtype)
        elif name == HEAD and model.config.tie_word_embeddings:
            continue
        elif kind != "keep":
            entry = parts[""][1]
            # A reader of its own: its map of the file goes with the tensor.
            plain = TensorReader().read(path, name, entry, entry.dtype)
            put_quantized(model, owner, quantize_weight(name, plain, kind), dtype)
        else:
            set_parameter(model, name, reader.read(path, name, parts[""][1], dtype, device))
    if model.config.tie_word_embeddings and HEAD in places:
        _check_tied(model, folder, places)
    _check_held(model, held, folder)
    for _, projection in quantized_projections(model):
        projection.to(device)
    return model


def _check_held(model: Llama, held: QuantizeConfig, folder: Path) -> None:
    """Check that what was asked for is what is held: a folder may hold it in other bits already."""
    kinds = kinds_held(model)
    for key, weight in weights_held(model).items():
        found = f"{weight.bits}-bit codes" if isinstance(weight, NfBitsWeight) else kinds[key]
        wanted = held.kind_of(HEAD if key == "head" else EMBEDDING)
        if wanted not in ("keep", found):
            raise ConfigError(f"quantize.{key} is {wanted}, but {folder} holds it as {found} already; leave it out")


def _read_quantized(
    model: Llama, name: str, parts: Mapping[str, tuple[Path, Entry]], reader: TensorReader
) -> QuantizedWeight:
    def read(part: str) -> Tensor:
        path, entry = parts[part]
        return reader.read(path, f"{name}.{part}" if part else name, entry, entry.dtype)

    path = next(iter(parts.values()))[0]
    rows, width = model.get_parameter(name).shape
    if parts.keys() & set(bits.PARTS):
        return bits.unpack(name, read, parts.keys(), (rows, width), path)
    weight, wanted = bnb.unpack(name, read, parts.keys(), path), (rows, width)
    if weight.shape != wanted:
        raise FormatError(f"{path}: tensor {name} has shape {weight.shape}, config.json asks for {wanted}")
    return weight


Places = dict[str, dict[str, tuple[Path, Entry]]]


def open_folder(folder: Path) -> tuple[Llama, Places, bool]:
    """Return the model of a folder without storage, where each weight's parts lie, and whether it is quantized.

    A plain weight is one part, ''; a quantized one has those of `bnb` or `bits`.

    Raises:
        FormatError: a tensor is missing, misshapen, or not the architecture's.
    """
    config, is_packed = read_config(folder), is_quantized(folder)
    places: Places = {}
    for name, place in read_entries(folder, has_codes=is_packed).items():
        if not name.endswith(_DERIVED):
            weight, part = _weight_part(name) if is_packed else (name, "")
            places.setdefault(weight, {})[part] = place
    if len(places) < config.num_layers:  # before a hostile config.json makes us build a billion layers
        raise FormatError(
            f"{folder} holds {len(places)} tensors; config.json: num_hidden_layers is {config.num_layers}"
        )
    with torch.device("meta"):
        model = Llama(config)
    model.eval()
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, parts in places.items():
        is_tied = config.tie_word_embeddings and name == HEAD
        _check_parts(name, parts, wanted.get(EMBEDDING if is_tied else name), may_be_codes=not is_tied)
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} first")
    if is_packed:
        _check_announced(folder, places, wanted)
    return model, places, is_packed


def _check_parts(
    name: str, parts: Mapping[str, tuple[Path, Entry]], shape: tuple[int, ...] | None, *, may_be_codes: bool
) -> None:
    """Check what is held of a weight against the shape that the architecture has for it, if it has one."""
    path, entry = parts.get("") or next(iter(parts.values()))
    place = f"{path}: tensor {name}"
    if shape is None:
        raise FormatError(f"{path} holds tensor {name}, which the architecture in config.json does not have")
    if "" not in parts:
        raise FormatError(f"{place} is missing, of it there is only {', '.join(sorted(parts))}")
    if len(parts) > 1:
        if not may_be_codes or len(shape) != 2:
            beside = ", ".join(sorted(parts.keys() - {""}))
            raise FormatError(f"{place} cannot be in few bits, but beside it there is its {beside}")
        return
    if entry.dtype in (torch.int8, torch.uint8):
        missing = bnb.ROW_ABSMAX if entry.dtype == torch.int8 else "scales"
        raise FormatError(f"{place} holds codes ({entry.dtype}), but lacks its {missing}")
    if entry.shape != shape:
        raise FormatError(f"{place} has shape {entry.shape}, config.json asks for {shape}")


def _check_announced(folder: Path, places: Places, shapes: Mapping[str, tuple[int, ...]]) -> None:
    values, path = _config_values(folder), folder / "config.json"
    if values[bnb.CONFIG_KEY]["quant_method"] == bits.METHOD:
        bits.check_matrices(values[bnb.CONFIG_KEY], places, shapes, path)
    else:
        bnb.check_kinds(values, {name: parts.keys() for name, parts in places.items()}, path)


def _weight_part(name: str) -> tuple[str, str]:
    for part in bits.PARTS:
        if name.endswith(f".weight.{part}"):
            return name.removesuffix(f".{part}"), part
    return bnb.weight_part(name)


def widest_dtype(places: Places) -> torch.dtype:
    """Return the widest dtype of the weights that are not quantized."""
    dtypes = {entry.dtype for parts in places.values() for _, entry in parts.values() if len(parts) == 1}
    return functools.reduce(torch.promote_types, dtypes)


def _check_tied(model: Llama, folder: Path, places: Places) -> None:
    if len(places[EMBEDDING]) > 1:
        raise FormatError(f"{folder} holds {HEAD}, but config.json ties it to an embedding that is quantized")

    def plain(name: str, dtype: torch.dtype) -> Tensor:
        path, entry = places[name][""]
        return TensorReader().read(path, name, entry, dtype, model.device)

    embedding = model.head_weight
    if not isinstance(embedding, Tensor):  # quantized just now, from what the file has
        embedding = plain(EMBEDDING, places[EMBEDDING][""][1].dtype)
    head = plain(HEAD, embedding.dtype)
    if head.shape != embedding.shape or not torch.equal(embedding, head):
        raise FormatError(f"{places[HEAD][''][0]}: {HEAD} differs from the embedding, but config.json ties them")


def read_entries(folder: Path, *, has_codes: bool = False) -> dict[str, tuple[Path, Entry]]:
    """Return the file and the place in it of every tensor in a model folder; no weight is read.

    Raises:
        FormatError: a file is missing, damaged, or pickled, or the index disagrees with the shards.
    """
    entries: dict[str, tuple[Path, Entry]] = {}
    for path, names in _weight_files(folder).items():
        if not path.is_file():
            raise FormatError(f"{folder} lacks the shard {path.name}, which {INDEX_FILE} names")
        header = read_header(path, has_codes=has_codes)
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

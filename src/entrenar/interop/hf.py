"""Hugging Face model folders: `config.json` and safetensors, in one file or in shards with an index.

Weight names are Hugging Face's own, so a tensor goes unchanged from file to parameter. Loading is tensor by tensor into
a model that was built without storage, so the peak is the model and one block of a tensor. `hf_files` reads and writes
the files, `quantized_layout` knows how quantized weights lie in them.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from entrenar.errors import ConfigError, FormatError
from entrenar.files import read_json, write_json
from entrenar.interop import bits, bnb, quantized_layout
from entrenar.interop.assemble import set_parameter
from entrenar.interop.generation_config import (
    read_generation_config,
    with_end_tokens,
    write_generation_config,
)
from entrenar.interop.hf_files import read_entries, write_index, write_shards
from entrenar.interop.quantized_layout import CONFIG_KEY
from entrenar.interop.safetensors_file import Entry, TensorReader
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import NfBitsWeight
from entrenar.peft import (
    QuantizeConfig,
    kinds_held,
    put_quantized,
    quantize_weight,
    quantized_projections,
    quantized_weights,
)
from entrenar.peft.quantize_config import EMBEDDING, HEAD

MAX_SHARD_BYTES = 5 * 10**9
# Memory held while a model is quantized, in addition to one weight.
MAX_QUANTIZED_SHARD_BYTES = 2 * 10**8
# Written by old exports of transformers; they follow from the config.
_DERIVED = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> LlamaConfig:
    """Read `config.json` of a model folder, with the end tokens of `generation_config.json`.

    Raises:
        FormatError: there is none, or it does not describe a LLaMA.
    """
    values = _config_values(folder)
    try:
        config = LlamaConfig.from_hf(values)
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}") from error
    return with_end_tokens(config, read_generation_config(folder))


def is_quantized(folder: Path) -> bool:
    """Return whether a model folder announces quantized weights.

    Raises:
        FormatError: there is no model, or its quantization is not supported.
    """
    return quantized_layout.is_announced(_config_values(folder), folder / "config.json")


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} is not a model folder: it has no config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def save_model(
    folder: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    *,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights into an existing folder; `weights` is a `Llama` state dict.

    `generation` is what else `generation_config.json` shall say: `Llama.generation` of a model that was loaded.

    Weight files of an earlier save that this one does not replace are removed: a reader would mix the two.
    """
    tensors = ((name, weights[name].detach().contiguous().cpu()) for name in weights)
    write_shards(folder, tensors, max_shard_bytes)
    _write_configs(folder, config, config.to_hf(_announced_dtype(weights)), generation)


def _announced_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    return weights[EMBEDDING].dtype if EMBEDDING in weights else next(iter(weights.values())).dtype


def save_around(
    folder: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    files: Mapping[str, str],
    *,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write all of a model folder but the files of weights; `files` names the file of each, which others write."""
    _write_configs(folder, config, config.to_hf(_announced_dtype(weights)), generation)
    if len(set(files.values())) > 1:
        write_index(folder, files, sum(weight.numel() * weight.element_size() for weight in weights.values()))


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
                yield from quantized_layout.pack(name, quantize_weight(name, weight, kind), dtype).items()
            else:
                yield name, weight.detach().to("cpu", dtype).contiguous()

    write_shards(folder, tensors(), max_shard_bytes)
    announced = bnb.quantization_config(dtype, held, is_tied=config.tie_word_embeddings)
    _write_configs(folder, config, config.to_hf(dtype) | {CONFIG_KEY: announced}, None)


def save_widths(folder: Path, model: Llama, total_bits: float) -> None:
    """Write a model quantized within a bit budget, in the layout of `bits`; copy the other weights unchanged."""
    held = quantized_weights(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in held.items():
            yield from quantized_layout.pack(name, weight, model.dtype).items()
        for name, parameter in model.named_parameters():
            yield name, parameter.detach().cpu().contiguous()

    write_shards(folder, tensors(), MAX_QUANTIZED_SHARD_BYTES)
    announced = bits.quantization_config(cast(Mapping[str, NfBitsWeight], held), total_bits)
    written = model.config.to_hf(model.dtype) | {CONFIG_KEY: announced}
    _write_configs(folder, model.config, written, model.generation)


def _write_configs(
    folder: Path, config: LlamaConfig, written: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> None:
    write_json(folder / "config.json", dict(written))
    write_generation_config(folder, config, generation or {})


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: bool = False,
    held: QuantizeConfig | None = None,
) -> Llama:
    """Load a model folder; without `dtype` as stored: in the widest dtype of its matrices, norms in theirs if wider.

    A quantized folder stays quantized; with `quantize` the projections of a plain one are, one by one while they are
    read and from the numbers in the file, and embedding and head as `held` says. `dtype` then applies to the others.

    Raises:
        FormatError: a file is missing, damaged, or disagrees with config.json.
        ConfigError: embedding or head cannot be held as asked.
    """
    model, places, is_packed = open_folder(folder)
    held = held or QuantizeConfig()
    held.check_tied(is_tied=model.config.tie_word_embeddings)
    of_vectors, dtype = dtype, dtype or widest_dtype(places)
    reader = TensorReader()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, parts in places.items():
        owner, path = name.removesuffix(".weight"), next(iter(parts.values()))[0]
        kind = held.kind_of(name) if quantize and not (is_packed and bnb.is_quantized(name)) else "keep"
        if len(parts) > 1:
            put_quantized(model, owner, quantized_layout.read(name, parts, shapes[name], reader), dtype)
        elif name == HEAD and model.config.tie_word_embeddings:
            continue
        elif kind != "keep":
            entry = parts[""][1]
            # A reader of its own: its map of the file goes with the tensor.
            plain = TensorReader().read(path, name, entry, entry.dtype)
            put_quantized(model, owner, quantize_weight(name, plain, kind), dtype)
        else:
            entry = parts[""][1]
            wanted = dtype if len(entry.shape) > 1 else of_vectors or torch.promote_types(entry.dtype, dtype)
            set_parameter(model, name, reader.read(path, name, entry, wanted, device))
    if model.config.tie_word_embeddings and HEAD in places:
        _check_tied(model, folder, places)
    _check_held(model, held, folder)
    for _, projection in quantized_projections(model):
        projection.to(device)
    return model


def _check_held(model: Llama, held: QuantizeConfig, folder: Path) -> None:
    """Check that the folder matches the request: it may hold embedding or head in another kind already."""
    for key, found in kinds_held(model).items():
        wanted = held.kind_of(HEAD if key == "head" else EMBEDDING)
        if wanted not in ("keep", found):
            raise ConfigError(f"quantize.{key} is {wanted}, but {folder} holds it as {found} already; leave it out")


Places = dict[str, dict[str, tuple[Path, Entry]]]


def open_folder(folder: Path) -> tuple[Llama, Places, bool]:
    """Return a folder's model without storage, where each weight's parts lie, and whether it is quantized.

    A plain weight is one part, ''; a quantized one has those of `bnb` or `bits`.

    Raises:
        FormatError: a tensor is missing, misshapen, or not the architecture's.
    """
    config, is_packed = read_config(folder), is_quantized(folder)
    places: Places = {}
    for name, place in read_entries(folder, has_codes=is_packed).items():
        if not name.endswith(_DERIVED):
            weight, part = quantized_layout.weight_part(name) if is_packed else (name, "")
            places.setdefault(weight, {})[part] = place
    if len(places) < config.num_layers:  # before a hostile config.json makes us build a billion layers
        raise FormatError(
            f"{folder} holds {len(places)} tensors; config.json: num_hidden_layers is {config.num_layers}"
        )
    with torch.device("meta"):
        model = Llama(config)
    model.eval()
    model.generation = read_generation_config(folder)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, parts in places.items():
        is_tied = config.tie_word_embeddings and name == HEAD
        _check_parts(name, parts, wanted.get(EMBEDDING if is_tied else name), may_be_codes=not is_tied)
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} tensors of the model, {missing[0]} first")
    if is_packed:
        quantized_layout.check_announced(_config_values(folder), places, wanted, folder / "config.json")
    return model, places, is_packed


def _check_parts(
    name: str, parts: Mapping[str, tuple[Path, Entry]], shape: tuple[int, ...] | None, *, may_be_codes: bool
) -> None:
    """Check a weight's stored tensors against the shape that the architecture has for it, if it has one."""
    path, entry = parts.get("") or next(iter(parts.values()))
    place = f"{path}: tensor {name}"
    if shape is None:
        raise FormatError(f"{path} holds tensor {name}, which the architecture in config.json does not have")
    if "" not in parts:
        raise FormatError(f"{place} is missing, of it there is only {', '.join(sorted(parts))}")
    if len(parts) > 1:
        if not may_be_codes or len(shape) != 2:
            beside = ", ".join(sorted(parts.keys() - {""}))
            raise FormatError(f"{place} cannot be quantized, but the folder also holds its {beside}")
        return
    if entry.dtype in (torch.int8, torch.uint8):
        missing = quantized_layout.missing_part(entry.dtype)
        raise FormatError(f"{place} holds codes ({entry.dtype}), but lacks its {missing}")
    if entry.shape != shape:
        raise FormatError(f"{place} has shape {entry.shape}, config.json asks for {shape}")


def widest_dtype(places: Places) -> torch.dtype:
    """Return the widest dtype of the plain matrices; of all plain weights, if every matrix is quantized."""
    plain = [entry for parts in places.values() for _, entry in parts.values() if len(parts) == 1]
    matrices = [entry for entry in plain if len(entry.shape) > 1]
    return functools.reduce(torch.promote_types, {entry.dtype for entry in matrices or plain})


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

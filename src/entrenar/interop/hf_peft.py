"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor's name is `base_model.model.`, the projection's name in the model, and `lora_A.weight`, `lora_B.weight` or
`lora_magnitude_vector`; a module that is trained in full has its own name. What a foreign config asks for and this
package does not compute is refused, never passed over. A PiSSA adapter is written as the plain adapter of twice the
rank that gives the same update of the untouched base, as PEFT's own conversion does, because its own form is of use
only to a reader that repeats the same decomposition.

Beside PEFT's two files lies `base.json`, which PEFT does not read: the name and the hash of the base the adapter was
trained on, so that another base of the same shape is noticed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from entrenar.errors import ConfigError, FormatError
from entrenar.files import read_json, write_json
from entrenar.interop.safetensors_file import TensorReader, read_header, write_tensors
from entrenar.model import Llama
from entrenar.peft import (
    DEFAULT_ADAPTER,
    LoraConfig,
    LoraLinear,
    QuantizeConfig,
    SavedModule,
    add_adapter,
    find_saved,
    find_targets,
    fingerprint,
    kinds_held,
    layer_number,
    plain_state,
    quantized_projections,
    shape_of,
    wrappers,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
PREFIX = "base_model.model."
_QUANTIZED = "nf4 "
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_INITS = {True: "default", False: "default", "gaussian": "gaussian", "eva": "default", "orthogonal": "default"}
# They say where an adapter came from or how it was begun, not what it computes.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class BaseIdentity:
    """Which base an adapter belongs to; the hash is that of the weights in this dtype.

    A base with projections in four bits has `nf4` before the dtype of the rest, and `quantize` says how its embedding
    and head are held.
    """

    name: str | None
    dtype: str
    sha256: str
    quantize: Mapping[str, Any] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the base had projections in four bits."""
        return self.dtype.startswith(_QUANTIZED)

    @property
    def is_within_budget(self) -> bool:
        """Whether embedding and head had, as each projection, a width of their own (`kinds_held` leaves those out)."""
        return self.quantize is not None and "embedding" not in self.quantize

    @property
    def plain_dtype(self) -> torch.dtype:
        """The dtype of what was not in few bits."""
        return _DTYPES[self.dtype.removeprefix(_QUANTIZED)]

    @property
    def held(self) -> QuantizeConfig:
        """How embedding and head of the base were held."""
        return QuantizeConfig.model_validate(self.quantize or {})


def identify_base(model: Llama, name: str | None = None, *, dtype: torch.dtype | None = None) -> BaseIdentity:
    """Hash the model's base weights, as they would be in `dtype` if it is another than theirs."""
    other = dtype if dtype != model.dtype else None
    sha256, held_in = fingerprint(plain_state(model), other), str(other or model.dtype)
    is_quantized = next(quantized_projections(model), None) is not None
    if not is_quantized:
        return BaseIdentity(name, held_in, sha256)
    return BaseIdentity(name, f"{_QUANTIZED}{held_in}", sha256, kinds_held(model))


def save_adapter(
    folder: Path, model: Llama, config: LoraConfig, name: str = DEFAULT_ADAPTER, base: BaseIdentity | None = None
) -> None:
    """Write one of the model's adapters into an existing folder.

    Raises:
        ConfigError: no adapter of that name is held.
        DiskFullError, MachineError: the disk refuses.
    """
    tensors = _tensors_of(model, name)
    if not tensors:
        raise ConfigError(f"no adapter {name!r} is held, so there is nothing to save")
    if model.config.tie_word_embeddings and f"{PREFIX}{_EMBEDDING}.weight" in tensors:
        tensors[f"{PREFIX}{_HEAD}.weight"] = tensors[f"{PREFIX}{_EMBEDDING}.weight"].clone()
    layers = sorted({number for key in tensors if (number := layer_number(key.removeprefix(PREFIX))) is not None})
    write_json(folder / CONFIG_FILE, _to_peft(config, layers, model, base))
    write_tensors(folder / WEIGHTS_FILE, tensors)
    if base is not None:
        write_json(folder / BASE_FILE, asdict(base))


def _tensors_of(model: Llama, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, module in wrappers(model):
        if name not in module.adapters:
            continue
        if isinstance(module, SavedModule):
            tensors[f"{PREFIX}{path}.weight"] = module.adapters[name].detach().contiguous()
            continue
        adapter = module.adapter(name)
        lora_a, lora_b = adapter.matrices()
        tensors[f"{PREFIX}{path}.lora_A.weight"] = lora_a.detach().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = lora_b.detach().contiguous()
        if adapter.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = adapter.lora_magnitude_vector.detach().contiguous()
    return tensors


def _to_peft(config: LoraConfig, layers: list[int], model: Llama, base: BaseIdentity | None) -> dict[str, Any]:
    widening = 2 if config.lora_init == "pissa" else 1
    # alpha grows with the rank just so that the scale, by either rule, stays what it was.
    alpha_widening = math.sqrt(widening) if config.use_rslora else widening
    is_tied = model.config.tie_word_embeddings and bool(config.modules_to_save)
    return {
        "alpha_pattern": {key: _number(alpha * alpha_widening) for key, alpha in config.alpha_pattern.items()},
        "base_model_name_or_path": base.name if base else None,
        "bias": "none",
        "ensure_weight_tying": is_tied,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.lora_init == "gaussian" else True,
        "layers_to_transform": None if config.layers == "all" else layers,
        "lora_alpha": _number(config.lora_alpha * alpha_widening),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.rank * widening,
        "rank_pattern": {key: rank * widening for key, rank in config.rank_pattern.items()},
        "target_modules": list(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def load_adapter(
    folder: Path, model: Llama, name: str = DEFAULT_ADAPTER, *, is_other_base_allowed: bool = False
) -> LoraConfig:
    """Hold the adapter of a PEFT folder, not yet in use, and return its config; on an error the model is unchanged.

    Raises:
        FormatError: the folder is damaged, asks for what is not computed here, or belongs to another base.
        ConfigError: an adapter of that name is held already.
    """
    header, weights = _open(folder)
    shapes = {key: entry.shape for key, entry in header.items()}
    values = _read_config(folder)
    config = _from_peft(values, list(shapes), folder / CONFIG_FILE, is_tied=model.config.tie_word_embeddings)
    expected = _expected_shapes(config, model, folder)
    if model.config.tie_word_embeddings:
        _check_tied_head(shapes, folder)
        shapes.pop(f"{PREFIX}{_HEAD}.weight", None)
    _check_shapes(shapes, expected, folder)
    if not is_other_base_allowed:
        check_base(folder, model)
    reader = TensorReader()
    tensors = {key: reader.read(weights, key, entry, entry.dtype) for key, entry in header.items()}
    head = tensors.pop(f"{PREFIX}{_HEAD}.weight", None) if model.config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, tensors[f"{PREFIX}{_EMBEDDING}.weight"]):
        raise FormatError(f"{weights}: lm_head differs from embed_tokens, but the model ties them")
    add_adapter(model, config, torch.Generator(), name)
    own = _parameters_of(model, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
    return config


def _parameters_of(model: Llama, name: str) -> dict[str, Tensor]:
    """Return the adapter's own tensors by PEFT's names; after PiSSA these are A and B without where they began."""
    own: dict[str, Tensor] = {}
    for path, module in wrappers(model):
        if name not in module.adapters:
            continue
        if isinstance(module, LoraLinear):
            for part, tensor in module.adapter(name).named_parameters():
                suffix = part if part == "lora_magnitude_vector" else f"{part}.weight"
                own[f"{PREFIX}{path}.{suffix}"] = tensor
        else:
            own[f"{PREFIX}{path}.weight"] = module.adapters[name]
    return own


def _open(folder: Path) -> tuple[Mapping[str, Any], Path]:
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise FormatError(
                f"{folder} holds a pickled adapter (adapter_model.bin), which can run code when it is read; convert it "
                "where you trust it, with PEFT's save_pretrained"
            )
        raise FormatError(f"{folder} is not an adapter folder: it has no {WEIGHTS_FILE}")
    return read_header(weights), weights


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _from_peft(values: dict[str, Any], keys: list[str], path: Path, *, is_tied: bool) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type must be LORA, got {values.get('peft_type')!r}")
    for key, value in values.items():
        if value and key not in _WITHOUT_EFFECT | _READ and not (key == "bias" and value == "none"):
            raise FormatError(f"{path}: {key} = {value!r} changes what the adapter computes; that is not supported")
    init = values.get("init_lora_weights", True)
    if init not in _INITS and init != "pissa":
        raise FormatError(
            f"{path}: init_lora_weights = {init!r} changes the base's weights in a way that cannot be repeated here; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    targets, layers = values.get("target_modules"), values.get("layers_to_transform")
    is_plain = isinstance(targets, list) and not values.get("exclude_modules")
    if not is_plain or values.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        # A regular expression or an exclusion: the tensors say by name what it came to.
        names = (key.removeprefix(PREFIX).partition(".lora_")[0] for key in keys if ".lora_" in key)
        targets, layers = list(dict.fromkeys(names)), None
    saved = [module for module in values.get("modules_to_save") or () if not (is_tied and module == _HEAD)]
    fields = {
        "rank": values.get("r"),
        "target_modules": targets,
        "layers": "all" if layers in (None, []) else [layers] if isinstance(layers, int) else layers,
        "lora_init": "pissa" if init == "pissa" else _INITS[init],
        "modules_to_save": saved,
    }
    same = ("lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
    fields |= {key: values[key] for key in same if values.get(key) is not None}
    try:
        return LoraConfig.model_validate(fields)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise FormatError(f"{path} describes no adapter: {'; '.join(faults)}") from error


def _expected_shapes(config: LoraConfig, model: Llama, folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        targets, saved = find_targets(model, config), find_saved(model, config)
    except ConfigError as error:
        raise FormatError(f"{folder} is an adapter for another base: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in targets.items():
        rank, (outputs, inputs) = config.rank_of(path), shape_of(module)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (rank, inputs)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (outputs, rank)
        if config.use_dora:
            shapes[f"{PREFIX}{path}.lora_magnitude_vector"] = (outputs,)
    return shapes | {
        f"{PREFIX}{path}.weight": tuple(cast(Tensor, module.weight).shape) for path, module in saved.items()
    }


def _check_tied_head(shapes: Mapping[str, object], folder: Path) -> None:
    embedding, head = (f"{PREFIX}{module}.weight" for module in (_EMBEDDING, _HEAD))
    if (embedding in shapes) != (head in shapes):
        held, missing = ("embed_tokens", "lm_head") if embedding in shapes else ("lm_head", "embed_tokens")
        raise FormatError(
            f"{folder} trains {held} apart from {missing}, but the model ties them; "
            "train it with ensure_weight_tying, or untie the base"
        )


def _check_shapes(held: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    faults = [f"{key} is missing" for key in expected if key not in held]
    faults += [f"{key} has no place in the model" for key in held if key not in expected]
    faults += [
        f"{key} has shape {held[key]}, the model asks for {shape}"
        for key, shape in expected.items()
        if key in held and held[key] != shape
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise FormatError(f"{folder} is an adapter for another base: {'; '.join(faults[:3])}{more}")


def read_base(folder: Path) -> BaseIdentity | None:
    """Return the base that an adapter was trained on, None where the folder does not say.

    Raises:
        FormatError: `base.json` is damaged.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        base = BaseIdentity(**values)
        QuantizeConfig.model_validate(base.quantize or {})
        _ = base.plain_dtype
    except (TypeError, AttributeError, KeyError, ValidationError) as error:
        raise FormatError(f"{path} must hold name, dtype and sha256 of the base: {error}") from error
    return base


def check_base(folder: Path, model: Llama) -> None:
    """Compare the base that the adapter was trained on with this one, as far as it is recorded.

    Raises:
        FormatError: the hashes differ in the dtype that is recorded. They say nothing if this one's is narrower, for
            then its numbers are no longer those of its file, or if only one of the two is in few bits.
    """
    recorded = read_base(folder)
    if recorded is None or torch.promote_types(model.dtype, recorded.plain_dtype) != model.dtype:
        return
    own = identify_base(model, dtype=recorded.plain_dtype)
    if recorded.dtype == own.dtype and recorded.sha256 != own.sha256:
        raise FormatError(
            f"{folder} was trained on another base: {recorded.name or 'unnamed'} with sha256 {recorded.sha256[:12]}…, "
            f"this one has {own.sha256[:12]}…; load it onto its own base, or merge --other-base"
        )

"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

`peft_keys` has the names of the tensors. What a foreign config asks for and this package does not compute is refused,
never passed over. A PiSSA adapter is written as the plain adapter of twice the
rank that gives the same update of the untouched base, as PEFT's own conversion does, because its own form is of use
only to a reader that repeats the same decomposition.

Next to PEFT's two files lies `base.json`, ignored by PEFT: the name and the hash of the base that the adapter was
trained on, so that another base of the same shape is noticed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from entrenar.errors import ConfigError, FormatError
from entrenar.files import read_json, write_json
from entrenar.interop.peft_keys import LORA_A, LORA_B, MAGNITUDE, WHOLE, key_of, keys_by_parameter, split_key
from entrenar.interop.safetensors_file import TensorReader, read_header, write_tensors
from entrenar.model import Llama
from entrenar.ops import Nf4Weight, NfBitsWeight
from entrenar.peft import (
    DEFAULT_ADAPTER,
    LoraConfig,
    LoraLinear,
    QuantizeConfig,
    add_adapter,
    find_saved,
    find_targets,
    fingerprint,
    kinds_held,
    layer_number,
    plain_state,
    quantized_weights,
    shape_of,
    wrappers,
)
from entrenar.peft.quantize_config import Kind

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
_PROJECTION = "_proj.weight"
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
    """The identity of an adapter's base; the hash is computed from the weights in this dtype.

    Attributes:
        dtype: of the plain weights, with the kind of the quantized projections before it where there are any: `nf4
            torch.bfloat16`.
        quantize: how embedding and head of a quantized base are held, where a config can say it.
    """

    name: str | None
    dtype: str
    sha256: str
    quantize: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str | None:
        """The kind of the base's projections; None where they are plain."""
        return self.dtype.rpartition(" ")[0] or None

    @property
    def is_quantized(self) -> bool:
        """Return whether the base had quantized projections."""
        return self.kind is not None

    @property
    def is_within_budget(self) -> bool:
        """Return whether each matrix of the base had its own width."""
        return self.kind == NfBitsWeight.kind

    @property
    def plain_dtype(self) -> torch.dtype:
        """The dtype of everything that was not quantized."""
        return _DTYPES[self.dtype.rpartition(" ")[2]]

    @property
    def held(self) -> QuantizeConfig:
        """The storage of the base's embedding and head."""
        return QuantizeConfig.model_validate(self.quantize or {})


def identify_base(model: Llama, name: str | None = None, *, dtype: torch.dtype | None = None) -> BaseIdentity:
    """Hash the model's base weights, converted to `dtype` if it differs from theirs."""
    other = dtype if dtype != model.dtype else None
    sha256, held_in = fingerprint(plain_state(model), other), str(other or model.dtype)
    projections = [weight for name, weight in quantized_weights(model).items() if name.endswith(_PROJECTION)]
    if not projections:
        return BaseIdentity(name, held_in, sha256)
    choices = {key: kind for key, kind in kinds_held(model).items() if kind in get_args(Kind)}
    return BaseIdentity(name, f"{projections[0].kind} {held_in}", sha256, choices)


def save_adapter(
    folder: Path,
    model: Llama,
    config: LoraConfig,
    name: str = DEFAULT_ADAPTER,
    base: BaseIdentity | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one of the model's adapters into an existing folder; `weights` take the place of the model's own.

    Raises:
        ConfigError: no adapter of that name is held.
        DiskFullError, MachineError: the disk refuses.
    """
    tensors = _tensors_of(model, name, dict(model.named_parameters()) if weights is None else weights)
    if not tensors:
        raise ConfigError(f"no adapter {name!r} is held, so there is nothing to save")
    if model.config.tie_word_embeddings and key_of(_EMBEDDING) in tensors:
        tensors[key_of(_HEAD)] = tensors[key_of(_EMBEDDING)].clone()
    layers = sorted({number for key in tensors if (number := layer_number(split_key(key)[0])) is not None})
    write_json(folder / CONFIG_FILE, _to_peft(config, layers, model, base))
    write_tensors(folder / WEIGHTS_FILE, tensors)
    if base is not None:
        write_json(folder / BASE_FILE, asdict(base))


def _tensors_of(model: Llama, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {key: weights[own] for own, key in keys_by_parameter(model, name).items()}
    for path, module in wrappers(model):
        if isinstance(module, LoraLinear) and name in module.adapters:
            keys = key_of(path, LORA_A), key_of(path, LORA_B)
            tensors |= zip(keys, module.adapter(name).with_start(*(tensors[key] for key in keys)), strict=True)
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


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
    _check_resized(shapes, model, folder)
    config = _from_peft(values, list(shapes), folder / CONFIG_FILE, is_tied=model.config.tie_word_embeddings)
    expected = _expected_shapes(config, model, folder)
    if model.config.tie_word_embeddings:
        _check_tied_head(shapes, folder)
        shapes.pop(key_of(_HEAD), None)
    _check_shapes(shapes, expected, folder)
    if not is_other_base_allowed:
        check_base(folder, model)
    reader = TensorReader()
    tensors = {key: reader.read(weights, key, entry, entry.dtype) for key, entry in header.items()}
    head = tensors.pop(key_of(_HEAD), None) if model.config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, tensors[key_of(_EMBEDDING)]):
        raise FormatError(f"{weights}: lm_head differs from embed_tokens, but the model ties them")
    add_adapter(model, config, torch.Generator(), name)
    own = _parameters_of(model, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
    return config


def _parameters_of(model: Llama, name: str) -> dict[str, Tensor]:
    """Return the adapter's own tensors by PEFT's names; after PiSSA these are A and B without their starting point."""
    parameters = dict(model.named_parameters())
    return {key: parameters[own] for own, key in keys_by_parameter(model, name).items()}


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
    if not isinstance(init, bool | str) or (init not in _INITS and init != "pissa"):
        raise FormatError(
            f"{path}: init_lora_weights = {init!r} changes the base's weights in a way that cannot be repeated here; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    targets, layers = values.get("target_modules"), values.get("layers_to_transform")
    is_plain = isinstance(targets, list) and not values.get("exclude_modules")
    if not is_plain or values.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        # A regular expression or an exclusion: the tensors say by name what it came to.
        names = (path for path, part in map(split_key, keys) if part != WHOLE)
        targets, layers = list(dict.fromkeys(names)), None
    saved = values.get("modules_to_save") or []
    if is_tied and isinstance(saved, list):
        saved = [module for module in saved if module != _HEAD]
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
        raise FormatError(f"{folder / CONFIG_FILE}: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in targets.items():
        rank, (outputs, inputs) = config.rank_of(path), shape_of(module)
        shapes |= {key_of(path, LORA_A): (rank, inputs), key_of(path, LORA_B): (outputs, rank)}
        if config.use_dora:
            shapes[key_of(path, MAGNITUDE)] = (outputs,)
    return shapes | {key_of(path): tuple(cast(Tensor, module.weight).shape) for path, module in saved.items()}


def _check_resized(shapes: Mapping[str, tuple[int, ...]], model: Llama, folder: Path) -> None:
    """Refuse an embedding or head with more rows than the model; PEFT saves these after tokens were added.

    Raises:
        FormatError: with the number of tokens that the base lacks.
    """
    for module in (_EMBEDDING, _HEAD):
        rows = shapes.get(key_of(module), (model.config.vocab_size,))[0]
        if rows != model.config.vocab_size:
            raise FormatError(
                f"{folder} was trained over a vocabulary of {rows} tokens ({module} is resized), the base has "
                f"{model.config.vocab_size}; give the base with those tokens, saved by transformers after "
                "resize_token_embeddings"
            )


def _check_tied_head(shapes: Mapping[str, object], folder: Path) -> None:
    embedding, head = key_of(_EMBEDDING), key_of(_HEAD)
    if (embedding in shapes) != (head in shapes):
        held, missing = ("embed_tokens", "lm_head") if embedding in shapes else ("lm_head", "embed_tokens")
        raise FormatError(
            f"{folder} trains {held} apart from {missing}, but the model ties them; "
            "train it with ensure_weight_tying, or untie the base"
        )


def _check_shapes(held: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    foreign = [key for key in held if key not in expected]
    for key in foreign:
        if split_key(key)[1] == WHOLE and "lora_" not in key:
            raise FormatError(
                f"{folder} holds {key}, which its config names neither in target_modules nor in modules_to_save; "
                "save it again with PEFT's save_pretrained(save_embedding_layers=False)"
            )
    faults = [f"{key} is missing" for key in expected if key not in held]
    faults += [f"{key} has no place in the model" for key in foreign]
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
        base = _of_any_version(BaseIdentity(**values))
        QuantizeConfig.model_validate(base.quantize or {})
        _ = base.plain_dtype
    except (TypeError, AttributeError, KeyError, ValidationError) as error:
        raise FormatError(f"{path} must hold name, dtype and sha256 of the base: {error}") from error
    return base


def _of_any_version(base: BaseIdentity) -> BaseIdentity:
    """Return the identity in today's format: a base within a bit budget used to be called nf4."""
    if base.kind == Nf4Weight.kind and base.quantize is not None and "embedding" not in base.quantize:
        return replace(base, dtype=base.dtype.replace(Nf4Weight.kind, NfBitsWeight.kind, 1))
    return base


def named_base(folder: Path) -> str | None:
    """Return the base's name from PEFT's adapter config; None where it has none.

    Raises:
        FormatError: the config is damaged.
    """
    name = _read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def check_base(folder: Path, model: Llama) -> None:
    """Compare this base with the recorded one that the adapter was trained on.

    Raises:
        FormatError: the hashes differ in the dtype that is recorded. They say nothing if this one's is narrower, for
            then its numbers are no longer those of its file, or if only one of the two is quantized.
    """
    recorded = read_base(folder)
    if recorded is None or torch.promote_types(model.dtype, recorded.plain_dtype) != model.dtype:
        return
    own = identify_base(model, dtype=recorded.plain_dtype)
    if recorded.is_quantized == own.is_quantized and recorded.sha256 != own.sha256:
        raise FormatError(
            f"{folder} was trained on another base: {recorded.name or 'unnamed'} with sha256 {recorded.sha256[:12]}…, "
            f"this one has {own.sha256[:12]}…; load it onto its own base, or merge --other-base"
        )

"""Hugging Face's `config.json`, both ways.

transformers 5 keeps everything about rotary positions in `rope_parameters`; transformers 4 has `rope_theta` next to
`rope_scaling`, whose key is `type` in the oldest files. All are read. Both spellings are written, because each reader
takes its own and finds the same numbers there. Keys that change no logit (dropout, `use_cache`, names and versions)
are passed over; a key that would change one is refused, never ignored.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from entrenar.errors import FormatError

if TYPE_CHECKING:
    import torch
    from pydantic_core import ErrorDetails

Config = TypeVar("Config", bound=BaseModel)

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
}
# What a reader of Hugging Face's assumes where the key is absent: it is not our own default everywhere.
_OPTIONAL = {
    "max_position_embeddings": ("max_seq_len", 2048),
    "num_key_value_heads": ("num_kv_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", None),
}
# The file's key of each of our fields: a fault is told in the words of the file.
_KEYS = {ours: key for key, ours in _REQUIRED.items()} | {ours: key for key, (ours, _) in _OPTIONAL.items()}
_MUST_BE = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `config.json` to the fields of LlamaConfig.

    Raises:
        FormatError: a field is missing or has a value that no LLaMA here has.
    """
    family = config.get("model_type", "llama")
    if family != "llama":
        raise FormatError(
            f"config.json: this is a model of the family {family!r}; entrenar reads LLaMA 2 and 3 only (model_type "
            "'llama')"
        )
    for key, wanted in _MUST_BE.items():
        if config.get(key, wanted) != wanted:
            raise FormatError(f"config.json: {key} must be {wanted!r} in a LLaMA, got {config[key]!r}")
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise FormatError(f"config.json: {', '.join(missing)} missing; a LLaMA's has {', '.join(_REQUIRED)}")
    fields = {ours: config[theirs] for theirs, ours in _REQUIRED.items()}
    fields |= {ours: config.get(theirs, default) for theirs, (ours, default) in _OPTIONAL.items()}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if fields[key] == -1:  # the first LLaMA conversions wrote -1 for "none"
            fields[key] = None
    return fields | _read_rope(config, fields["max_seq_len"])


def _read_rope(config: Mapping[str, Any], max_seq_len: Any) -> dict[str, Any]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise FormatError(f"config.json: rope_parameters must be an object, got {rope!r}")
    scaling = {key: value for key, value in rope.items() if value is not None}
    theta = scaling.pop("rope_theta", config.get("rope_theta", 10000.0))
    if scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise FormatError("config.json: partial_rotary_factor must be 1.0: a LLaMA turns whole heads")
    oldest_name = scaling.pop("type", "default")
    rope_type = scaling.pop("rope_type", oldest_name)
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if rope_type in ("yarn", "llama3"):
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or max_seq_len
    else:  # older writers leave the key, which these two rules do not read
        scaling.pop("original_max_position_embeddings", None)
    return {"rope_theta": theta, "rope_scaling": {"rope_type": rope_type, **scaling}}


def build(cls: type[Config], fields: dict[str, Any]) -> Config:
    """Validate `fields` into `cls`, with every fault in one FormatError.

    Raises:
        FormatError: some fields break a rule.
    """
    try:
        return cls(**fields)
    except ValidationError as error:
        raise FormatError(f"config.json: {'; '.join(map(_described, error.errors()))}") from error


def write(fields: Mapping[str, Any], kv_heads: int, head_width: int, dtype: "torch.dtype | None") -> dict[str, Any]:
    """Translate the fields of LlamaConfig (those that are set) to `config.json`."""
    names = _REQUIRED | {theirs: ours for theirs, (ours, _) in _OPTIONAL.items()}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **_MUST_BE}
    config |= {theirs: fields.get(ours) for theirs, ours in names.items()}
    config |= {"num_key_value_heads": kv_heads, "head_dim": head_width, "attention_dropout": 0.0, "use_cache": True}
    if isinstance(config["eos_token_id"], tuple):
        config["eos_token_id"] = list(config["eos_token_id"])
    scaling = dict(fields.get("rope_scaling", {}))
    theta = fields["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": theta}
    config["rope_theta"] = theta
    # Readers before transformers 4.43 know these two rules only, and insist on exactly these two keys.
    is_oldest = scaling.get("rope_type") in ("linear", "dynamic")
    config["rope_scaling"] = (
        {"type": scaling["rope_type"], "factor": scaling["factor"]} if is_oldest else scaling or None
    )
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config


def _described(fault: "ErrorDetails") -> str:
    """Return a fault in the words of the file."""
    place = ".".join(_KEYS.get(str(part), str(part)) for part in fault["loc"])
    return f"{place}: {fault['msg']}, got {fault['input']!r}" if place else fault["msg"]

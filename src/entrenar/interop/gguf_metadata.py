"""The keys of a GGUF file: architecture and vocabulary of a LLaMA in llama.cpp's words, both ways.

The keys are those of `convert_hf_to_gguf.py` and `llama-model.cpp` (github.com/ggml-org/llama.cpp). llama3's stretching
has no key: it is a tensor, `rope_freqs.weight`, by which each plane's frequency is divided.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from entrenar.data.tokenizer.vocabulary import CONTROL, UNUSED, Vocabulary, WordPattern
from entrenar.errors import FormatError
from entrenar.model import LlamaConfig, RopeScaling
from entrenar.model.rope_scaling import inverse_frequencies

# The name that is written for each way to cut words, and all names that llama.cpp has for it (llama-vocab.cpp).
_PRE: Mapping[WordPattern, str] = {
    "llama3": "llama-bpe", "gpt2": "gpt-2", "digits": "smollm", "qwen2": "qwen2", "tekken": "tekken",
    "default": "default",
}  # fmt: skip
_NAMES_OF_PATTERN: Mapping[WordPattern, tuple[str, ...]] = {
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt2": ("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"),
    "tekken": ("tekken",),
    "default": ("default",),
}
_PATTERN_OF_PRE = {name: pattern for pattern, names in _NAMES_OF_PATTERN.items() for name in names}
# Keys of the architecture that are read, or that change no number.
_READ = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "vocab_size",
}  # fmt: skip
# The values of other keys that are the same as not having the key.
_WITHOUT_EFFECT = {
    "attention.causal": True, "attention.scale": 0.0, "embedding_scale": 1.0, "logit_scale": 1.0,
    "residual_scale": 1.0, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0, "tensor_data_layout": "Meta AI original pth",
}  # fmt: skip
# Tokens that end a turn, whatever the file says of them (llama-vocab.cpp, special_eog_ids).
_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "< EOT >"}
_LLAMA3_ORIGINALS = (8192, 4096, 2048, 131072)


def architecture_metadata(config: LlamaConfig) -> dict[str, Any]:
    """Return the keys that describe the architecture.

    Raises:
        FormatError: llama.cpp has no such rotary scaling.
    """
    keys: dict[str, Any] = {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.head_width,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_width,
        "llama.attention.value_length": config.head_width,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
    }
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return keys
    original = scaling.original_max_position_embeddings
    unknown = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim, "truncate": scaling.truncate}
    if scaling.rope_type == "dynamic" or {value for value in unknown.values() if value is not None} - {True}:
        raise FormatError(f"llama.cpp has no rotary scaling like {scaling!r}; keep the Hugging Face folder")
    keys |= {"llama.rope.scaling.type": scaling.rope_type, "llama.rope.scaling.factor": scaling.factor}
    if scaling.rope_type == "yarn":
        keys["llama.rope.scaling.original_context_length"] = original or config.max_seq_len
        options = {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            options["attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1.0)
        keys |= {f"llama.rope.scaling.{name}": value for name, value in options.items() if value is not None}
    return keys


def rope_factors(config: LlamaConfig) -> Tensor | None:
    """Return `rope_freqs.weight` of a llama3 scaling: unstretched over stretched frequency of each plane."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    plain, _ = inverse_frequencies(config.model_copy(update={"rope_scaling": None}), 0)
    stretched, _ = inverse_frequencies(config, 0)
    return plain / stretched


def read_architecture(
    path: Path, metadata: Mapping[str, Any], vocab_size: int, *, is_tied: bool, factors: Tensor | None
) -> LlamaConfig:
    """Return the config that the keys describe.

    Raises:
        FormatError: naming the key.
    """
    if metadata.get("general.architecture") != "llama":
        raise FormatError(f"{path}: general.architecture must be 'llama', got {metadata.get('general.architecture')!r}")

    _check_keys(path, metadata)
    if metadata.get("llama.vocab_size", vocab_size) != vocab_size:
        raise FormatError(
            f"{path}: llama.vocab_size is {metadata['llama.vocab_size']!r}, but the embedding has {vocab_size} rows"
        )

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{path}: llama.{key} must be a number, got {value!r}")
        return value

    fields = _fields(path, metadata, number) | {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
    try:
        config = LlamaConfig.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(_KEYS.get(str(part), part)) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors()
        )
        raise FormatError(f"{path}: the header does not describe a LLaMA: {faults}") from error
    return config if factors is None else _with_llama3(path, config, factors)


# The file's key of each size: a fault is told in the words of the file.
_KEYS = {
    "hidden_size": "llama.embedding_length", "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count", "num_kv_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length", "intermediate_size": "llama.feed_forward_length",
    "max_seq_len": "llama.context_length", "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}  # fmt: skip


def _fields(path: Path, metadata: Mapping[str, Any], number: Callable[..., Any]) -> dict[str, Any]:
    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads if heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if number(key, head_dim) != head_dim:
            raise FormatError(f"{path}: llama.{key} must be the head width {head_dim}, got {number(key)}")
    return {
        "hidden_size": width,
        "num_layers": number("block_count"),
        "num_heads": heads,
        "num_kv_heads": number("attention.head_count_kv", heads),
        "head_dim": None if heads and head_dim * heads == width else head_dim,
        "intermediate_size": number("feed_forward_length"),
        "max_seq_len": number("context_length"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 12),  # a float32 of 1e-5 is 9.99999975e-6
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _read_scaling(path, metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _check_keys(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a key of the architecture that is not read here and is not as good as absent: it may change a logit."""
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if name == key or name in _READ or not value or _WITHOUT_EFFECT.get(name) == value:
            continue
        raise FormatError(f"{path}: {key} = {value!r:.60} changes what the model computes; that is not supported")


def _end_tokens(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """Return the tokens that end a text: those the keys name, and those that end a turn by their text."""
    ids = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        pairs = zip(tokens, kinds, strict=False)
        ids += [index for index, (token, kind) in enumerate(pairs) if kind == CONTROL and token in _ENDS]
    found = list(dict.fromkeys(index for index in ids if index is not None))
    return found[0] if len(found) == 1 else found or None


def _read_scaling(path: Path, metadata: Mapping[str, Any]) -> RopeScaling | None:
    """Return the scaling by llama.cpp's rules: linear where no type is given, the factor by either of its keys."""

    def key(name: str) -> Any:
        return metadata.get(f"llama.rope.{name}")

    kind, factor = key("scaling.type") or "linear", key("scaling.factor") or key("scale_linear") or 1.0
    attention = key("scaling.attn_factor") or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise FormatError(f"{path}: llama.rope.scaling.type must be none, linear or yarn, got {kind!r}")
    if kind != "yarn" and attention != 1.0:
        raise FormatError(
            f"{path}: llama.rope.scaling.attn_factor = {attention!r} without yarn changes what the model computes; "
            "that is not supported"
        )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    fields: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        fields["original_max_position_embeddings"] = key("scaling.original_context_length")
        fields |= {name: key(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    try:
        scaling = RopeScaling.model_validate(fields)
        if kind == "yarn" and attention != 1.0:
            # llama.cpp multiplies its own attention factor, 0.1 ln(factor) + 1, by this one.
            own = 0.1 * math.log(scaling.factor) + 1.0
            scaling = RopeScaling.model_validate(fields | {"attention_factor": own * float(f"{attention:.7g}")})
    except (ValidationError, TypeError, ValueError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise FormatError(f"{path}: llama.rope.scaling: {what}") from error
    return scaling


def _with_llama3(path: Path, config: LlamaConfig, factors: Tensor) -> LlamaConfig:
    """Find the llama3 scaling whose factors a file holds: it says only what they come to."""
    for original in (*_LLAMA3_ORIGINALS, config.max_seq_len // max(1, round(float(factors.max())))):
        scaling = RopeScaling(
            rope_type="llama3",
            factor=max(1.0, round(float(factors.max()), 4)),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=max(1, min(original, config.max_seq_len)),
        )
        guess = config.model_copy(update={"rope_scaling": scaling})
        found = rope_factors(guess)
        if found is not None and found.shape == factors.shape and torch.allclose(found, factors.float(), rtol=1e-5):
            return guess
    raise FormatError(f"{path}: tensor rope_freqs.weight is of no llama3 scaling with low and high factors 1 and 4")


def vocabulary_metadata(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """Return the keys that hold the vocabulary, filled up to the rows of the embedding.

    Raises:
        FormatError: the model has fewer rows than the tokenizer has tokens.
    """
    missing = vocab_size - len(vocabulary.tokens)
    if missing < 0:
        raise FormatError(f"the tokenizer has {len(vocabulary.tokens)} tokens, the model {vocab_size} rows for them")
    tokens = vocabulary.tokens + [f"[PAD{index}]" for index in range(len(vocabulary.tokens), vocab_size)]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if vocabulary.pattern is None else "gpt2",
        "tokenizer.ggml.pre": "default" if vocabulary.pattern is None else _PRE[vocabulary.pattern],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": vocabulary.kinds + [UNUSED] * missing,
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.ggml.add_eos_token": vocabulary.add_eos,
    }
    if vocabulary.pattern is None:
        keys["tokenizer.ggml.scores"] = vocabulary.scores + [0.0] * missing
        keys["tokenizer.ggml.add_space_prefix"] = vocabulary.adds_space
    else:
        keys["tokenizer.ggml.merges"] = [" ".join(merge) for merge in vocabulary.merges]
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "padding": vocabulary.pad_id,
        "unknown": vocabulary.unk_id,
    }
    keys |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    if vocabulary.chat_template is not None:
        keys["tokenizer.chat_template"] = vocabulary.chat_template
    return keys


def read_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary | None:
    """Return the vocabulary, None where a file has none.

    Raises:
        FormatError: naming the key.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None or model == "none":
        return None
    if model not in ("llama", "gpt2"):
        raise FormatError(f"{path}: tokenizer.ggml.model must be llama or gpt2, as a LLaMA's is, got {model!r}")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and pre not in _PATTERN_OF_PRE:
        raise FormatError(f"{path}: tokenizer.ggml.pre must be one of {', '.join(_PATTERN_OF_PRE)}, got {pre!r}")
    tokens = _list(path, metadata, "tokens", str)
    kinds = _list(path, metadata, "token_type", int, [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in _list(path, metadata, "merges", str, [])]
    for number, merge in enumerate(merges):
        if len(merge) != 2:
            raise FormatError(f"{path}: tokenizer.ggml.merges[{number}] must be two tokens, got {' '.join(merge)!r}")
    unk_id = _index(path, metadata, "unknown")
    return Vocabulary(
        tokens=tokens,
        scores=_list(path, metadata, "scores", float, [0.0] * len(tokens)),
        kinds=kinds,
        merges=[(left, right) for left, right in merges] if model == "gpt2" else [],
        pattern=None if model == "llama" else _PATTERN_OF_PRE[pre],
        bos_id=_index(path, metadata, "bos"),
        eos_id=_index(path, metadata, "eos"),
        pad_id=_index(path, metadata, "padding"),
        unk_id=unk_id if unk_id is not None or model == "gpt2" else 0,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama")),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        adds_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", model == "llama")),
        chat_template=_text(path, metadata, "tokenizer.chat_template"),
    )


def _list(
    path: Path, metadata: Mapping[str, Any], name: str, kind: type, default: list[Any] | None = None
) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise FormatError(f"{path}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
    return values


def _index(path: Path, metadata: Mapping[str, Any], role: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise FormatError(f"{path}: tokenizer.ggml.{role}_token_id must be an id, got {value!r}")
    return value


def _text(path: Path, metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{path}: {key} must be text, got {value!r}")
    return value

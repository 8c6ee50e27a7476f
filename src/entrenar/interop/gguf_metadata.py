"""What a GGUF file says of a LLaMA beside its weights: architecture and vocabulary, in llama.cpp's words, both ways.

The keys are those of `convert_hf_to_gguf.py` and `llama-model.cpp` (github.com/ggml-org/llama.cpp). llama3's stretching
has no key: it is a tensor, `rope_freqs.weight`, by which each plane's frequency is divided.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from entrenar.data.tokenizer.vocabulary import UNUSED, Vocabulary
from entrenar.errors import FormatError
from entrenar.model import LlamaConfig, RopeScaling
from entrenar.model.rope_scaling import inverse_frequencies

_PRE = {"llama3": "llama-bpe", "gpt2": "gpt-2"}
_PATTERN_OF_PRE = {"llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3", "gpt-2": "gpt2"}
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
    is_plain = scaling.model_dump(exclude_none=True).keys() <= {
        "rope_type",
        "factor",
        "original_max_position_embeddings",
    }
    if scaling.rope_type == "dynamic" or not is_plain:
        raise FormatError(f"llama.cpp has no rotary scaling like {scaling!r}; keep the Hugging Face folder")
    keys |= {"llama.rope.scaling.type": scaling.rope_type, "llama.rope.scaling.factor": scaling.factor}
    if scaling.rope_type == "yarn":
        keys["llama.rope.scaling.original_context_length"] = original or config.max_seq_len
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

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{path}: llama.{key} must be a number, got {value!r}")
        return value

    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads if heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if number(key, head_dim) != head_dim:
            raise FormatError(f"{path}: llama.{key} must be the head width {head_dim}, got {number(key)}")
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": number("block_count"),
        "num_heads": heads,
        "num_kv_heads": number("attention.head_count_kv", heads),
        "head_dim": None if heads and head_dim * heads == width else head_dim,
        "intermediate_size": number("feed_forward_length"),
        "max_seq_len": number("context_length"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 12),  # a float32 of 1e-5 is 9.99999975e-6
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": is_tied,
        "rope_scaling": _read_scaling(path, metadata),
    }
    for role, key in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        fields[role] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    try:
        config = LlamaConfig.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise FormatError(f"{path}: the header is that of no LLaMA: {faults}") from error
    return config if factors is None else _with_llama3(path, config, factors)


def _read_scaling(path: Path, metadata: Mapping[str, Any]) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise FormatError(f"{path}: llama.rope.scaling.type must be none, linear or yarn, got {kind!r}")
    original = metadata.get("llama.rope.scaling.original_context_length") if kind == "yarn" else None
    try:
        return RopeScaling(
            rope_type=kind,
            factor=metadata.get("llama.rope.scaling.factor", 1.0),
            original_max_position_embeddings=original,
        )
    except ValidationError as error:
        raise FormatError(f"{path}: llama.rope.scaling.factor: {error.errors()[0]['msg']}") from error


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
        pattern=None if model == "llama" else "llama3" if _PATTERN_OF_PRE[pre] == "llama3" else "gpt2",
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

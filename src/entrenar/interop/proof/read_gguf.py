"""An independent reader of GGUF: the gguf package's reader, its table of names, its dequantization."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from entrenar.interop.gguf import gguf_package
from entrenar.interop.proof.frequencies import frequencies
from entrenar.interop.proof.numpy_llama import Array, Shape
from entrenar.interop.proof.piece_encoder import PieceEncoder
from entrenar.interop.proof.readback import Readback

_ROLES = ("bos", "eos")
# llama.cpp's own patterns for the names of `tokenizer.ggml.pre` (llama-vocab.cpp), each cutting what is left.
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: Mapping[str, tuple[str, ...]] = {
    "llama-bpe": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER}",),
    "qwen2": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_AFTER}",),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
        r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
_SAME_CUTS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "stablelm2": "qwen2", "starcoder": "smollm"}
_WHOLE_WORDS = ("llama-bpe", "tekken")


def read_gguf_file(path: Path) -> Readback:
    """Read weights, architecture and vocabulary of a file, or of all parts of a split one."""
    gguf = gguf_package()
    reader = gguf.GGUFReader(path)
    found = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    count = _key(reader, "split.count", 1)
    for number in range(2, count + 1):
        other = gguf.GGUFReader(path.with_name(path.name.replace("-00001-of-", f"-{number:05d}-of-")))
        found |= {tensor.name.removesuffix(".weight"): tensor for tensor in other.tensors}
    num_layers = _key(reader, "llama.block_count")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)

    def weight(name: str) -> Array:
        tensor = found[table.get_name(name.removesuffix(".weight"))]
        values: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values

    hf_names = {name: table.get_name(name.removesuffix(".weight")) for name in _all_names(num_layers)}
    names = frozenset(name for name, theirs in hf_names.items() if theirs in found)
    unknown = set(found) - set(hf_names.values()) - {"rope_freqs"}
    shape = _shape(reader, found)
    return Readback(names | unknown, weight, shape, _gguf_encoder(reader), _gguf_names(reader), _gguf_roles(reader))


def _key(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _shape(reader: Any, found: Mapping[str, Any]) -> Shape:
    """Read the architecture, with llama.cpp's defaults for the keys that some writers leave out."""

    def key(name: str, default: Any = None) -> Any:
        return _key(reader, f"llama.{name}", default)

    heads = key("attention.head_count")
    width = key("attention.key_length", key("embedding_length") // heads)
    theta = key("rope.freq_base", 10000.0)
    planes, scale = frequencies(theta, width, _scaling(key))
    if "rope_freqs" in found:
        planes = frequencies(theta, width, {})[0] / found["rope_freqs"].data
    return Shape(
        key("block_count"), heads, key("attention.head_count_kv", heads), key("attention.layer_norm_rms_epsilon"),
        planes, scale, is_interleaved=True, is_tied="output" not in found,
    )  # fmt: skip


def _scaling(key: Callable[..., Any]) -> dict[str, Any]:
    factor = key("rope.scaling.factor", 0) or key("rope.scale_linear", 0) or 1.0
    scaling = {
        "rope_type": key("rope.scaling.type", "linear"),
        "factor": factor,
        "original_max_position_embeddings": key("rope.scaling.original_context_length", key("context_length")),
        "beta_fast": key("rope.scaling.yarn_beta_fast"),
        "beta_slow": key("rope.scaling.yarn_beta_slow"),
    }
    if scaling["rope_type"] == "yarn":
        scaling["attention_factor"] = (1 + 0.1 * math.log(factor)) * (key("rope.scaling.attn_factor") or 1.0)
    return scaling


def _all_names(num_layers: int) -> list[str]:
    inner = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    layers = [f"model.layers.{layer}.{name}.weight" for layer in range(num_layers) for name in inner]
    return ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *layers]


def _gguf_names(reader: Any) -> Callable[[str], int | None] | None:
    field = reader.get_field("tokenizer.ggml.tokens")
    return None if field is None else {name: index for index, name in enumerate(field.contents())}.get


def _gguf_roles(reader: Any) -> dict[str, int | None]:
    fields = {role: reader.get_field(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
    return {role: None if field is None else int(field.contents()) for role, field in fields.items()}


def _gguf_encoder(reader: Any) -> Any:
    tokens = _key(reader, "tokenizer.ggml.tokens")
    if tokens is None:
        return None
    kinds = _key(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    if _key(reader, "tokenizer.ggml.model") == "llama":
        scores = _key(reader, "tokenizer.ggml.scores", [0.0] * len(tokens))
        adds_space = _key(reader, "tokenizer.ggml.add_space_prefix") is not False
        unknown = _key(reader, "tokenizer.ggml.unknown_token_id", 0)
        return PieceEncoder(tokens, scores, kinds, unknown, adds_space=adds_space)
    merges = [tuple(merge.split(" ")) for merge in _key(reader, "tokenizer.ggml.merges")]
    return _byte_level(tokens, kinds, merges, _key(reader, "tokenizer.ggml.pre"))


def _byte_level(tokens: Sequence[str], kinds: Sequence[int], merges: list[tuple[str, str]], pre: str) -> Any:
    """Build what llama.cpp does for `gpt2` vocabularies from the package's parts."""
    name = _SAME_CUTS.get(pre, pre)
    normal = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(normal, merges, ignore_merges=name in _WHOLE_WORDS))
    cuts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _CUTS.get(name, (_GPT2,))
    ]
    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts, levels])
    return lambda text: backend.encode(text, add_special_tokens=False).ids

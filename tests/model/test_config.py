"""The shape's rules, its exact counts, and config.json both ways."""

from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from entrenar.errors import ConfigError, FormatError
from entrenar.model import Llama, LlamaConfig, RopeScaling

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_FILE: dict[str, Any] = {  # the fields of the published config.json of Llama 3.1 8B Instruct
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA31,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
SHAPES = [
    LlamaConfig(vocab_size=50, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, intermediate_size=40),
    LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        num_layers=1,
        num_heads=3,
        head_dim=10,
        intermediate_size=40,
        tie_word_embeddings=True,
    ),
]


def meta_parameters(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


def test_defaults_are_the_specifications() -> None:
    """The six fields of the specification have its names and its defaults."""
    config = LlamaConfig()
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (32000, 4096, 32)
    assert (config.num_heads, config.intermediate_size, config.max_seq_len) == (32, 11008, 2048)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("124m", 123_685_632), ("1b", 1_100_048_384), ("7b", 6_738_415_616), ("llama3-8b", 8_030_261_248)],
)
def test_presets_have_the_published_number_of_parameters(name: str, expected: int) -> None:
    """Each preset has exactly the parameters of the model it is named after, in the formula and in the module."""
    config = LlamaConfig.preset(name)
    assert config.parameter_count() == expected
    assert meta_parameters(config) == expected


def test_tiny_preset_has_five_to_eight_million_parameters() -> None:
    """The tiny preset is small enough for minutes on two cores."""
    assert 5e6 < LlamaConfig.preset("tiny").parameter_count() < 8e6


def test_preset_takes_changes_and_checks_them() -> None:
    """Fields given beside the name override the preset, and obey the same rules."""
    assert LlamaConfig.preset("tiny", vocab_size=99).vocab_size == 99
    with pytest.raises(ValidationError, match="num_heads must be a multiple of num_kv_heads, got 8 and 3"):
        LlamaConfig.preset("tiny", num_kv_heads=3)


def test_unknown_preset_names_the_known() -> None:
    """A wrong preset name is answered with the right ones."""
    with pytest.raises(ConfigError, match=r"one of tiny, 124m, 1b, 7b, llama3-8b, got '13b'"):
        LlamaConfig.preset("13b")


@pytest.mark.parametrize("config", SHAPES)
def test_parameter_count_equals_the_module(config: LlamaConfig) -> None:
    """The closed form counts what the module holds."""
    assert config.parameter_count() == meta_parameters(config)


@pytest.mark.parametrize("config", SHAPES)
def test_flops_equal_the_counted_matrix_products(config: LlamaConfig) -> None:
    """Torch's own counter finds the weights' share, and a sum over queries and the keys they see finds attention's."""
    num_tokens = 16
    with torch.device("meta"):
        model = Llama(config)
    with FlopCounterMode(display=False, depth=None) as counter:
        model(torch.zeros(2, num_tokens, dtype=torch.long, device="meta")).sum().backward()
    counts = counter.get_flop_counts()
    # By module, because norms may sum their rows by a matrix product.
    parts = [ops[torch.ops.aten.mm] for module, ops in counts.items() if module.endswith((".self_attn", ".mlp"))]
    weights = sum(parts) + 6 * 2 * num_tokens * config.vocab_size * config.hidden_size  # the head is a call, no module
    pairs = sum(position + 1 for position in range(num_tokens)) * config.num_layers * config.num_heads
    assert weights + 2 * 12 * config.head_width * pairs == 2 * num_tokens * config.flops_per_token(num_tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 100, "num_heads": 12},
            "hidden_size must be a multiple of num_heads, got 100 and 12; .* head_dim",
        ),
        ({"num_heads": 32, "num_kv_heads": 5}, "multiple of num_kv_heads, got 32 and 5; use a divisor of 32"),
        ({"hidden_size": 96, "num_heads": 32}, "head width must be even, .* got 3; give an even head_dim"),
        ({"head_dim": 7}, "head width must be even, .* got 7"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"hidden": 5}, "Extra inputs are not permitted"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "greater than or equal to 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "'linear' takes no beta_fast; remove"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' needs low_freq_factor and high_freq_factor"),
        (
            {"rope_scaling": LLAMA31 | {"high_freq_factor": 1}},
            "high_freq_factor must be > low_freq_factor, got 1.0 and 1",
        ),
        ({"rope_scaling": LLAMA31}, "original_max_position_embeddings must be <= max_seq_len, got 8192 and 2048"),
        (
            {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "dynamic rope_scaling needs a head width of at least 4, got 2",
        ),
    ],
)
def test_broken_rules_are_named(fields: dict[str, Any], message: str) -> None:
    """Each rule states itself, the values, and the way out."""
    with pytest.raises(ValidationError, match=message):
        LlamaConfig(**fields)


def test_config_is_frozen() -> None:
    """A shape does not change under a model that was built from it."""
    with pytest.raises(ValidationError, match="frozen"):
        LlamaConfig().vocab_size = 3  # type: ignore[misc]


def test_published_llama31_file_is_read() -> None:
    """The published config.json gives Llama 3.1's shape, its three end tokens and its scaling."""
    config = LlamaConfig.from_hf(LLAMA31_FILE)
    assert config.parameter_count() == 8_030_261_248
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope_scaling == RopeScaling(**LLAMA31)
    assert (config.rope_theta, config.max_seq_len) == (500000.0, 131072)


SCALINGS = [
    None,
    RopeScaling(rope_type="linear", factor=2.5),
    RopeScaling(rope_type="dynamic", factor=4.0),
    RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=512, beta_fast=16.0, truncate=False),
    RopeScaling(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
    ),
]
EVERYTHING: dict[str, Any] = {
    "hidden_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 22,
    "rope_theta": 1234.5,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
    "bos_token_id": 5,
    "eos_token_id": (6, 7),
    "pad_token_id": 8,
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_config_json_round_trip(scaling: RopeScaling | None) -> None:
    """What is written is read back as it was: by us, by us through transformers 5, and from the old keys alone."""
    config = LlamaConfig(**EVERYTHING, rope_scaling=scaling)
    written = config.to_hf(torch.bfloat16)
    assert LlamaConfig.from_hf(written) == config
    theirs = transformers.LlamaConfig.from_dict(written)
    assert theirs.dtype == torch.bfloat16
    assert LlamaConfig.from_hf(theirs.to_dict()) == config
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "head_dim", "dtype")}
    assert LlamaConfig.from_hf(old | {"head_dim": 22}) == config
    new = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta")}
    assert LlamaConfig.from_hf(new) == config


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    """A short file is read with Hugging Face's defaults, not ours."""
    short = {key: LLAMA31_FILE[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    short |= {"num_hidden_layers": 2, "num_attention_heads": 32, "model_type": "llama"}
    config, theirs = LlamaConfig.from_hf(short), transformers.LlamaConfig(**short)
    assert (config.rms_norm_eps, config.max_seq_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (config.kv_heads, config.head_width) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert (config.rope_theta, config.tie_word_embeddings) == (theirs.rope_parameters["rope_theta"], False)


def test_llama1_files_with_minus_one_are_read() -> None:
    """The first conversions wrote -1 for a token that does not exist."""
    assert LlamaConfig.from_hf(LLAMA31_FILE | {"pad_token_id": -1}).pad_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"config.json: this is a model of the family 'mistral'; entrenar reads LLaMA"),
        ({"hidden_act": "gelu"}, r"hidden_act must be 'silu' in a LLaMA, got 'gelu'"),
        ({"attention_bias": True}, r"attention_bias must be False in a LLaMA, got True"),
        ({"mlp_bias": True}, r"mlp_bias must be False in a LLaMA, got True"),
        ({"hidden_size": None, "vocab_size": None}, r"config.json: vocab_size, hidden_size missing; a LLaMA's has"),
        ({"hidden_size": "wide"}, r"config.json: hidden_size: Input should be a valid integer.*got 'wide'"),
        ({"num_attention_heads": 33}, r"config.json: .*hidden_size must be a multiple of num_heads, got 4096 and 33"),
        ({"rope_scaling": 3}, r"config.json: rope_parameters must be an object, got 3"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            r"rope_scaling.rope_type: Input should be 'linear'.*got 'longrope'",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling.factor: Field required"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1.0"),
    ],
)
def test_foreign_files_are_refused_by_field(change: dict[str, Any], message: str) -> None:
    """A file that is no LLaMA of ours is refused with the field at fault."""
    with pytest.raises(FormatError, match=message):
        LlamaConfig.from_hf(LLAMA31_FILE | change)


def test_all_faults_of_a_file_come_at_once() -> None:
    """One error names every field at fault, by its key in the file."""
    with pytest.raises(FormatError, match=r"vocab_size: .*num_hidden_layers: .*max_position_embeddings: "):
        LlamaConfig.from_hf(LLAMA31_FILE | {"vocab_size": -1, "num_hidden_layers": "x", "max_position_embeddings": 0})


def test_dynamic_scaling_stretches_the_context() -> None:
    """The context is max_seq_len, times the factor where the scaling is dynamic."""
    assert LlamaConfig(max_seq_len=100).context_length == 100
    assert LlamaConfig(max_seq_len=100, rope_scaling=SCALINGS[1]).context_length == 100
    assert LlamaConfig(max_seq_len=100, rope_scaling=SCALINGS[2]).context_length == 400

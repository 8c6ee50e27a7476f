"""The shape of a LLaMA, and all that follows from the shape alone: counts, costs, the `config.json` of others.

The field names and defaults are those of the specification (`max_seq_len`, `num_layers`, …); `to_hf` and `from_hf`
translate to and from Hugging Face's `config.json`. Architecture: Touvron et al. 2023, arXiv:2307.09288; Grattafiori
et al. 2024, arXiv:2407.21783. Ways to stretch the rotary positions: linear (Chen 2023, arXiv:2306.15595), dynamic NTK
and YaRN (Peng 2023, arXiv:2309.00071), llama3 (Llama 3.1's own).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from entrenar.errors import ConfigError
from entrenar.model import hf_config
from entrenar.runs import FIXED

if TYPE_CHECKING:
    import torch

Checkpointing = Literal["none", "selective", "full"]
_WIDE = 256
PresetName = Literal["tiny", "124m", "1b", "7b", "llama3-8b"]

_OPTIONS_OF_SCALING = {
    "linear": set[str](),
    "dynamic": set[str](),
    "yarn": {
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    },
    "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


class RopeScaling(BaseModel):
    """Settings for stretching rotary frequencies past the pre-training length; the keys are Hugging Face's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    """The rule: linear, dynamic (NTK), yarn or llama3."""
    factor: float = Field(ge=1, le=1e6)
    """How many times longer the context becomes."""
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    """yarn, llama3: the length of the pre-training context; max_seq_len when not given."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths above original/low_freq_factor are divided by `factor`."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths below original/high_freq_factor stay as they are."""
    beta_fast: float | None = Field(default=None, gt=0)
    """yarn: rotations over the original context above which a frequency stays (32)."""
    beta_slow: float | None = Field(default=None, gt=0)
    """yarn: rotations over the original context below which a frequency is divided (1)."""
    mscale: float | None = None
    """yarn: weight of ln(factor) in the numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn: weight of ln(factor) in the denominator of the attention factor."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: what cos and sin are multiplied with; 0.1 ln(factor) + 1 when not given."""
    truncate: bool | None = None
    """yarn: round the blending range outwards to whole dimensions (true)."""

    @model_validator(mode="after")
    def _takes_only_its_own_options(self) -> "RopeScaling":
        given = {name for name, value in self if value is not None} - {"rope_type", "factor"}
        foreign = sorted(given - _OPTIONS_OF_SCALING[self.rope_type])
        if foreign:
            raise ValueError(f"rope_type {self.rope_type!r} takes no {', '.join(foreign)}; remove it")
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None:
                raise ValueError("rope_type 'llama3' needs low_freq_factor and high_freq_factor; Llama 3.1 has 1 and 4")
            if high <= low:
                raise ValueError(f"high_freq_factor must be > low_freq_factor, got {high} and {low}")
        return self


# Limits that no model comes near: past them sizes overflow, and building the modules alone takes hours.
_MOST_WIDTH, _MOST_ROWS, _MOST_LAYERS, _MOST_HEADS, _MOST_POSITIONS = 1 << 20, 1 << 24, 1 << 14, 1 << 16, 1 << 31


class LlamaConfig(BaseModel):
    """The architecture of a LLaMA 2 or 3."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vocab_size: int = Field(default=32000, gt=0, le=_MOST_ROWS, json_schema_extra=FIXED)
    """Rows of the embedding and of the head."""
    hidden_size: int = Field(default=4096, gt=0, le=_MOST_WIDTH, json_schema_extra=FIXED)
    """Model width D."""
    num_layers: int = Field(default=32, gt=0, le=_MOST_LAYERS, json_schema_extra=FIXED)
    """Blocks of attention and MLP."""
    num_heads: int = Field(default=32, gt=0, le=_MOST_HEADS, json_schema_extra=FIXED)
    """Query heads H."""
    intermediate_size: int = Field(default=11008, gt=0, le=_MOST_WIDTH, json_schema_extra=FIXED)
    """Hidden width F of the MLP."""
    max_seq_len: int = Field(default=2048, gt=0, le=_MOST_POSITIONS)
    """Longest context the positions are made for."""
    num_kv_heads: int | None = Field(default=None, gt=0, le=_MOST_HEADS, json_schema_extra=FIXED)
    """Key/value heads G, a divisor of num_heads; num_heads when not given."""
    head_dim: int | None = Field(default=None, gt=0, le=_MOST_HEADS, json_schema_extra=FIXED)
    """Head width K, even; hidden_size / num_heads when not given."""
    rope_theta: float = Field(default=10000.0, gt=0, le=1e30)
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies."""
    rms_norm_eps: float = Field(default=1e-5, ge=0, le=1)
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = Field(default=False, json_schema_extra=FIXED)
    """The head is the embedding, transposed."""
    initializer_range: float = Field(default=0.02, gt=0, le=100)
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = Field(default=None, ge=0)
    """Token that begins a text."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Token, or tokens, that end a text."""
    pad_token_id: int | None = Field(default=None, ge=0)
    """Token that fills short rows."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "LlamaConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}; "
                "change one of them or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.kv_heads}; "
                f"use a divisor of {self.num_heads}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"the head width must be even, because rotary positions turn pairs, got {self.head_width}; "
                "give an even head_dim or change num_heads"
            )
        return self

    @model_validator(mode="after")
    def _scaling_fits(self) -> "LlamaConfig":
        scaling = self.rope_scaling
        if scaling is None:
            return self
        if scaling.rope_type == "dynamic" and self.head_width < 4:
            raise ValueError(f"dynamic rope_scaling needs a head width of at least 4, got {self.head_width}")
        original = scaling.original_max_position_embeddings
        if original is not None and original > self.max_seq_len:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings must be <= max_seq_len, got {original} and "
                f"{self.max_seq_len}; max_seq_len is the stretched length"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Head width K."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def context_length(self) -> int:
        """The longest text the positions reach: dynamic scaling stretches max_seq_len when a text needs it."""
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            return int(self.max_seq_len * self.rope_scaling.factor)
        return self.max_seq_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text; Llama 3.1 has three."""
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return self.eos_token_id or ()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LlamaConfig":
        """Return a named architecture, with `changes` over it.

        Raises:
            ConfigError: there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ConfigError(f"model preset must be one of {', '.join(get_args(PresetName))}, got {name!r}")
        return cls(**{**_PRESETS[name], **changes})

    @classmethod
    def of_width(cls, width: int, **changes: Any) -> "LlamaConfig":
        """Return an architecture of this width with the usual proportions, with `changes` over it.

        Heads are 32 to 64 wide, the MLP is 8/3 of the width, and there is one layer per 64 of width.

        Raises:
            ValueError: a model cannot have this width.
        """
        head_width = 32 if width < _WIDE else 64
        usual = {
            "hidden_size": width,
            "num_layers": max(2, width // 64),
            "num_heads": width // head_width if width > 0 and width % head_width == 0 else 1,
            "intermediate_size": max(8, -(-8 * width // 3 // 32) * 32),
            "tie_word_embeddings": True,
        }
        return cls(**{**usual, **changes})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read Hugging Face's `config.json`, of transformers 5 or older.

        Raises:
            FormatError: a field is missing, malformed, or asks for what no LLaMA has (biases, another activation).
        """
        return hf_config.build(cls, hf_config.read(config))

    def to_hf(self, dtype: "torch.dtype | None" = None) -> dict[str, Any]:
        """Return `config.json` for LlamaForCausalLM, in the words of transformers 5 and of older readers at once."""
        return hf_config.write(self.model_dump(exclude_none=True), self.kv_heads, self.head_width, dtype)

    @property
    def _block_matmul_parameters(self) -> int:
        attention = self.hidden_size * self.head_width * (2 * self.num_heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def parameter_count(self) -> int:
        """Count the parameters: V·D (twice when the head is untied) + L·(2·D·K·(H+G) + 3·D·F + 2·D) + D."""
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        block = self._block_matmul_parameters + 2 * self.hidden_size
        return embedding + self.num_layers * block + self.hidden_size

    def flops_per_token(self, seq_len: int) -> int:
        """Count the floating-point operations of one training token in matrix products, forward and backward.

        A weight of a matrix product costs 2 forward and 4 backward (dX and dW), the head included, the embedding's
        look-up not. A causal query at position t meets t+1 keys, (T+1)/2 on average; each costs 4·H·K forward
        (scores, mix) and twice that backward: 6·H·K·(T+1) a layer. Recomputation is not counted: this is what the
        model needs, not what an implementation spends. (Chowdhery 2022, arXiv:2204.02311, appendix B, which counts
        masked scores too.)
        """
        weights = self.num_layers * self._block_matmul_parameters + self.vocab_size * self.hidden_size
        attention = self.num_layers * self.num_heads * self.head_width * (seq_len + 1)
        return 6 * weights + 6 * attention


_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_layers": 6,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 704,
        "max_seq_len": 256,
        "tie_word_embeddings": True,
    },
    "124m": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "intermediate_size": 2560,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "num_layers": 22,
        "num_heads": 32,
        "num_kv_heads": 4,
        "intermediate_size": 5632,
    },
    "7b": {"max_seq_len": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "llama3-8b": {
        "vocab_size": 128256,
        "num_kv_heads": 8,
        "intermediate_size": 14336,
        "max_seq_len": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}

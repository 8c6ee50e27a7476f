"""The angles of rotary positions: frequencies, their stretching past the pre-training context, cos and sin.

Position p turns plane i of a head of width K by p·f_i with f_i = θ^(-2i/K) (Su 2021, arXiv:2104.09864). Each way to
stretch the context changes f_i, none changes the turn itself:

    linear    f_i / factor                                                       (Chen 2023, arXiv:2306.15595)
    dynamic   θ grows with the length n of the text once n > max_seq_len:
              θ · (factor·n/max_seq_len - (factor-1))^(K/(K-2))                  (NTK; Peng 2023, arXiv:2309.00071)
    yarn      f_i / factor for slow planes, f_i for fast ones, blended linearly between `beta_slow` and `beta_fast`
              rotations over the original context; cos and sin times 0.1 ln(factor) + 1           (same, eq. 22-25)
    llama3    the same blend, between two wavelengths                            (Grattafiori 2024, arXiv:2407.21783)

Everything runs in float32 and in the order in which published models were trained and are served, so the table equals
theirs bit for bit; float64 angles would be more exact and would move every logit.
"""

import math
from typing import cast

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from entrenar import ops
from entrenar.model.config import LlamaConfig, RopeScaling


def inverse_frequencies(
    config: LlamaConfig, length: int | Int[Tensor, "*rows"], device: torch.device | None = None
) -> tuple[Float32[Tensor, "*rows half"], float]:
    """Return the frequency of each plane for a text of `length` tokens, and the factor of cos and sin.

    A tensor of lengths gives each of its entries the frequencies of its own text.
    """
    scaling, width = config.rope_scaling, config.head_width
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    frequencies = 1.0 / (config.rope_theta**exponents)
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(config, scaling.factor, exponents, length), 1.0
    original = scaling.original_max_position_embeddings or config.max_seq_len
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling, original), 1.0
    return _yarn(config, scaling, exponents, original), _yarn_attention_factor(scaling)


def _dynamic(config: LlamaConfig, factor: float, exponents: Tensor, length: int | Tensor) -> Tensor:
    frequencies = 1.0 / (config.rope_theta**exponents)
    lengths = torch.as_tensor(length, device=exponents.device)[..., None]
    stretch = factor * lengths.clamp(min=config.max_seq_len) / config.max_seq_len - (factor - 1)
    theta = config.rope_theta * stretch ** (config.head_width / (config.head_width - 2))
    return torch.where(lengths > config.max_seq_len, 1.0 / (theta**exponents), frequencies)


def _llama3(frequencies: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    # RopeScaling lets no llama3 pass without the two.
    low, high = cast(float, scaling.low_freq_factor), cast(float, scaling.high_freq_factor)
    wavelengths = 2 * math.pi / frequencies
    is_slow = wavelengths > original / low
    is_between = ~(wavelengths < original / high) & ~is_slow
    stretched = torch.where(is_slow, frequencies / scaling.factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / scaling.factor + blend * stretched
    return torch.where(is_between, blended, stretched)


def _yarn(config: LlamaConfig, scaling: RopeScaling, exponents: Tensor, original: int) -> Tensor:
    width, theta = config.head_width, config.rope_theta

    def plane_of(rotations: float) -> float:
        """Return the plane that turns so often over the original context, as a real number."""
        return (width * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = plane_of(scaling.beta_fast or 32.0), plane_of(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # the width that the published rule gives an empty ramp
    ramp = torch.arange(width // 2, dtype=torch.float32, device=exponents.device)
    kept = 1 - ((ramp - low) / (high - low)).clamp(0, 1)
    wavelengths = theta**exponents
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def weighted(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return weighted(scaling.mscale) / weighted(scaling.mscale_all_dim)
    return weighted(1.0)


class RotaryTable:
    """cos and sin of the positions 0, 1, …, made on first use and kept for each device.

    Not a buffer: a buffer would be cast by `model.to(torch.bfloat16)`, saved, and left empty by `to_empty`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._is_dynamic = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
        self._tables: dict[torch.device, tuple[int, Tensor, Tensor]] = {}

    def rows(self, num_positions: int, device: torch.device) -> tuple[Float[Tensor, "P half"], Float[Tensor, "P half"]]:
        """Return cos and sin of at least the positions 0 … num_positions-1, for a text of that length."""
        length = max(num_positions, self._config.max_seq_len) if self._is_dynamic else 0
        made_for, cos, sin = self._tables.get(device, (-1, None, None))
        if cos is None or sin is None or made_for != length or len(cos) < num_positions:
            # A power of two, so that a text that grows by one token does not make a table for each.
            size = 1 << (num_positions - 1).bit_length()
            # A table made under inference_mode could not be used in training afterwards.
            with torch.inference_mode(mode=False), torch.no_grad():
                frequencies, factor = inverse_frequencies(self._config, length, device)
                angles = torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequencies
                cos, sin = angles.cos() * factor, angles.sin() * factor
            self._tables[device] = (length, cos, sin)
        return cos, sin

    def of_documents(self, documents: ops.Documents) -> tuple[Float[Tensor, "B T half"], Float[Tensor, "B T half"]]:
        """Return cos and sin at each token's position in its document, each document turned as if it were alone."""
        positions = documents.positions
        if not self._is_dynamic or positions.shape[1] <= self._config.max_seq_len:
            cos, sin = self.rows(positions.shape[1], positions.device)
            return cos[positions], sin[positions]
        frequencies, factor = inverse_frequencies(self._config, documents.lengths, positions.device)
        angles = positions[..., None].float() * frequencies
        return angles.cos() * factor, angles.sin() * factor

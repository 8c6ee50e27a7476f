"""Compute rotary frequencies in numpy from a file's fields, sharing no code with the model.

The rules, for texts within the original context: linear and llama3 as in `model.rope_scaling`, YaRN as in Peng 2023,
arXiv:2309.00071, eq. 22-25. Dynamic NTK changes nothing there.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from entrenar.interop.proof.numpy_llama import Array


def frequencies(theta: float, width: int, scaling: Mapping[str, Any]) -> tuple[Array, float]:
    """Return the frequency of each plane of a head, and the factor of cos and sin.

    `scaling` has transformers' keys, `rope_type` or the older `type` among them; empty for none.
    """
    plain: Array = 1.0 / theta ** (np.arange(0, width, 2) / width)
    kind, factor = scaling.get("rope_type", scaling.get("type", "default")), float(scaling.get("factor") or 1.0)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return _llama3(plain, factor, scaling), 1.0
    if kind != "yarn":
        return plain, 1.0
    kept = _kept(theta, width, scaling)
    return plain / factor * (1 - kept) + plain * kept, _attention_factor(factor, scaling)


def _llama3(plain: Array, factor: float, scaling: Mapping[str, Any]) -> Array:
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * plain / (2 * np.pi)  # over the original context
    share = np.clip((turns - low) / (high - low), 0, 1)  # 0 for slow planes, 1 for fast ones
    blended: Array = (1 - share) * plain / factor + share * plain
    return blended


def _kept(theta: float, width: int, scaling: Mapping[str, Any]) -> Array:
    """Return how much of each plane's frequency stays unchanged."""
    original = scaling["original_max_position_embeddings"]
    edges = [
        width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.get("beta_fast") or 32.0, scaling.get("beta_slow") or 1.0)
    ]
    if scaling.get("truncate") is not False:
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    first, last = max(edges[0], 0), min(edges[1], width - 1)
    kept: Array = 1 - np.clip((np.arange(width // 2) - first) / ((last - first) or 0.001), 0, 1)
    return kept


def _attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def weighted(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return weighted(scaling["mscale"]) / weighted(scaling["mscale_all_dim"])
    return weighted(1.0)

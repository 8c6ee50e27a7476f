"""Test data drawn whole: hypothesis chooses shape, seed and scale, and torch fills the tensor in one call.

Drawn element by element, a tensor costs hypothesis a choice a number (`benchmarks/test_data.py` measures both).
What shrinks is the shape and the seed, which is what a failing algebraic property needs.
"""

from hypothesis import strategies as st
from torch import Generator, Tensor, dtype, float64, randn


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int, dtype: dtype = float64, scale: float = 1.0) -> Tensor:
    """Return the normal tensor of a seed; every dtype sees the same numbers, rounded."""
    return (randn(*shape, generator=Generator().manual_seed(seed), dtype=float64) * scale).to(dtype)


def tensors(*shape: int, dtype: dtype = float64, scale: float = 1.0) -> st.SearchStrategy[Tensor]:
    """Draw normal tensors of one shape by their seed."""
    return seeds().map(lambda seed: normal(seed, *shape, dtype=dtype, scale=scale))

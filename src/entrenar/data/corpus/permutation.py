"""Shuffle n numbers without a list of them: a keyed bijection of 0 … n-1 in O(1) memory.

A Feistel network (Luby and Rackoff 1988) permutes the 2h-bit numbers whatever its round function is: a round (l, r) →
(r, l ^ F(r)) is undone by (l, r) → (r ^ F(l), l). With 2h the first even number of bits that holds n-1, at most 4n
numbers are permuted; results of n or more are permuted again until they fall below n ("cycle walking", Black and
Rogaway 2002). Following a permutation's cycles from inside a subset back into the subset is again a bijection, of the
subset.
"""

from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.uint64]]
_ROUNDS = 6


def mix64(value: Indices) -> Indices:
    """Scatter the bits of 64-bit numbers (the finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def round_keys(*key: int) -> Indices:
    """Return a key per round, depending on every number of `key`."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix64(state + np.uint64(part % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15))
    counters = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
    return mix64(state + counters * np.uint64(0x9E3779B97F4A7C15))


def feistel(value: Indices, half_bits: int, keys: Indices) -> Indices:
    """Permute numbers of 2·half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (mix64(right + key) & mask)
    return (left << shift) | right


def permute(index: Indices, size: int, keys: Indices) -> Indices:
    """Return where each of `index` (below `size`) goes; over 0 … size-1 every number comes once."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    placed = feistel(index, half_bits, keys)
    outside = placed >= np.uint64(size)
    while outside.any():
        placed[outside] = feistel(placed[outside], half_bits, keys)
        outside = placed >= np.uint64(size)
    return placed

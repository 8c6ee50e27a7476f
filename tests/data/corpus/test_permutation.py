"""`entrenar.data.corpus.permutation`: a keyed bijection without memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.corpus.permutation import feistel, mix64, permute, round_keys


def _indices(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint64)


@pytest.mark.proof
def test_permute_is_a_bijection_for_every_size_to_512():
    """For every n up to 512 and two keys, the images of 0 … n-1 are 0 … n-1, each once."""
    for size in range(1, 513):
        for key in range(2):
            placed = permute(_indices(size), size, round_keys(7, key))
            assert np.array_equal(np.sort(placed), _indices(size)), (size, key)


@pytest.mark.proof
def test_feistel_is_a_bijection_of_its_whole_domain():
    """The network permutes all numbers of 2h bits, h up to 8, before any cycle is walked."""
    for half_bits in range(1, 9):
        domain = 1 << (2 * half_bits)
        placed = feistel(_indices(domain), half_bits, round_keys(3))
        assert np.array_equal(np.sort(placed), _indices(domain)), half_bits


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.permutation",
    "placed = feistel(index, half_bits, keys)",
    "placed = feistel(index >> np.uint64(1), half_bits, keys)",
)
@given(st.integers(1, 1 << 45), st.integers(0, 1 << 62), st.lists(st.integers(0, 1 << 45), min_size=1, max_size=50))
def test_permute_stays_in_range_and_apart_for_huge_sizes(size: int, seed: int, picks: list[int]):
    """Different numbers go to different places below n, one by one as in an array."""
    index = np.array(sorted({pick % size for pick in picks}), dtype=np.uint64)
    keys = round_keys(seed)
    placed = permute(index.copy(), size, keys)
    assert (placed < size).all()
    assert len(set(placed.tolist())) == len(index)
    alone = [int(permute(index[at : at + 1].copy(), size, keys)[0]) for at in range(len(index))]
    assert alone == placed.tolist()


def test_orders_of_different_keys_are_unrelated():
    """Two epochs share about as many positions as two random orders do, and neighbours do not stay together."""
    size = 10_000
    first, second = (permute(_indices(size), size, round_keys(0, epoch)).astype(np.int64) for epoch in (0, 1))
    assert np.count_nonzero(first == second) < 10  # Poisson with mean 1
    assert np.count_nonzero(np.abs(np.diff(first)) == 1) < 12  # Poisson with mean 2
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.05


def test_places_are_uniform():
    """Over 1,000 keys, every number of 0 … 9 lands on every place with frequency 1/10 (χ², 99.9 % over 81 degrees)."""
    counts = np.zeros((10, 10))
    for key in range(1000):
        counts[np.arange(10), permute(_indices(10), 10, round_keys(key)).astype(int)] += 1
    chi_squared = float(((counts - 100) ** 2 / 100).sum())
    assert chi_squared < 125.0


def test_round_keys_depend_on_every_part():
    """Changing seed, corpus or epoch changes the keys; so does swapping them."""
    keys = {tuple(round_keys(*parts).tolist()) for parts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0,), (0, 0))}
    assert len(keys) == 6


MASK, GAMMA = (1 << 64) - 1, 0x9E3779B97F4A7C15


def splitmix64(value: int) -> int:
    """The finalizer as published, in Python's own numbers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize("half_bits", [1, 2, 5])
def test_a_network_is_the_published_one(half_bits: int):
    """Over its whole domain, without any walk: each round exchanges the halves and adds a hash of one to the other."""
    keys, mask, expected = round_keys(4).tolist(), (1 << half_bits) - 1, []
    for value in range(1 << 2 * half_bits):
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (splitmix64((right + key) & MASK) & mask)
        expected.append(left << half_bits | right)
    assert feistel(_indices(len(expected)), half_bits, round_keys(4)).tolist() == expected


@pytest.mark.parametrize(("size", "half_bits"), [(1, 1), (2, 1), (3, 1), (4, 1)])
def test_small_sizes_walk_the_smallest_network(size: int, half_bits: int):
    """A walk goes through the numbers of the fewest bits that hold the size, an even number of them."""
    keys, expected = round_keys(11), []
    network = feistel(_indices(1 << 2 * half_bits), half_bits, keys).tolist()
    for index in range(size):
        place = network[index]
        while place >= size:
            place = network[place]
        expected.append(place)
    assert permute(_indices(size), size, keys).tolist() == expected


def test_the_order_never_changes():
    """Positions in checkpoints mean this order: it is that of a plain Feistel network, and pinned by its numbers."""
    # The first outputs of SplitMix64 with seed 0, as other implementations give them.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    steps = np.array([(GAMMA * count) & MASK for count in (1, 2, 3)], dtype=np.uint64)
    assert mix64(steps).tolist() == first == [splitmix64(int(step)) for step in steps]
    state = splitmix64((splitmix64((7 + GAMMA) & MASK) + 9 + GAMMA) & MASK)
    keys = [splitmix64((state + GAMMA * count) & MASK) for count in range(1, 7)]
    assert round_keys(7, 9).tolist() == keys
    for part in (-1, 1 << 63, 5 + (1 << 64)):
        state = splitmix64((part + GAMMA) & MASK)
        assert round_keys(part).tolist() == [splitmix64((state + GAMMA * count) & MASK) for count in range(1, 7)]
    for size, half_bits in ((2, 1), (5, 2), (16, 2), (17, 3), (100, 4)):
        order = []
        for index in range(size):
            place = index
            while not order[index:]:
                left, right = place >> half_bits, place & ((1 << half_bits) - 1)
                for key in keys:
                    left, right = right, left ^ (splitmix64((right + key) & MASK) & ((1 << half_bits) - 1))
                place = (left << half_bits) | right
                if place < size:
                    order.append(place)
        assert permute(np.arange(size, dtype=np.uint64), size, round_keys(7, 9)).tolist() == order
    assert permute(np.arange(10, dtype=np.uint64), 10, round_keys(1, 2)).tolist() == [9, 6, 7, 4, 5, 0, 8, 3, 1, 2]

"""`entrenar.data.corpus.dedup`: a compact set of hashes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.corpus.dedup import SeenHashes, document_hash


@pytest.mark.property
@pytest.mark.kills("data.corpus.dedup", "return False", "return True")
@given(st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 20)))
def test_seen_hashes_behave_as_a_set(values: list[int]):
    """`add` says True exactly for values that a set does not hold yet (0 and 1 count as one hash)."""
    seen, model = SeenHashes(), set()
    for value in values:
        stored = value or 1
        assert seen.add(value) is (stored not in model)
        model.add(stored)
    assert len(seen) == len(model)


def test_seen_hashes_grow_and_stay_compact():
    """50,000 entries that collide in their low bits are all kept, in at most 32 bytes each."""
    seen = SeenHashes()
    values = [number << 13 for number in range(1, 50_001)]
    assert all(seen.add(value) for value in values[:500])
    spread = [document_hash(str(number).encode()) for number in range(50_000)]
    assert all(seen.add(value) for value in spread)
    assert not any(seen.add(value) for value in spread + values[:500])
    assert seen.size_bytes <= 32 * len(seen)


def test_document_hash_is_blake2b():
    """The hash is a published function, so splits stay the same between versions."""
    assert document_hash(b"abc") == 0x5995D533D814BBD8  # printf abc | b2sum -l 64, bytes reversed
    assert document_hash(b"abc") != document_hash(b"abd")

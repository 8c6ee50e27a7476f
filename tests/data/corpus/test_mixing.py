"""`entrenar.data.corpus.mixing`: shares are exact at any length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.corpus.mixing import draw, integer_weights


@pytest.mark.property
@pytest.mark.kills("data.corpus.mixing", "_, corpus = min(due)", "_, corpus = max(due)")
@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=6), st.integers(1, 300))
def test_no_corpus_strays_by_a_whole_sample(weights: list[int], length: int):
    """After any number of draws, |drawn - share| < 1 for every corpus."""
    chosen = draw(weights, [0] * len(weights), length)
    total, counts = sum(weights), [0] * len(weights)
    for step, corpus in enumerate(chosen.tolist(), 1):
        counts[corpus] += 1
        assert all(abs(count * total - step * weight) < total for count, weight in zip(counts, weights, strict=True))


@pytest.mark.property
@pytest.mark.kills("data.corpus.mixing", "counts[corpus] += 1", "counts[corpus] += 0")
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_whole_weights_are_met_exactly_after_their_sum(weights: list[int]):
    """Weights that are window counts give every window of every corpus once."""
    chosen = draw(weights, [0] * len(weights), sum(weights)).tolist()
    assert [chosen.count(corpus) for corpus in range(len(weights))] == weights


@pytest.mark.property
@pytest.mark.kills("data.corpus.mixing", "sum(weights), list(drawn)", "sum(weights), [0] * len(drawn)")
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 100), st.integers(1, 100))
def test_drawing_in_two_parts_equals_drawing_at_once(weights: list[int], first: int, second: int):
    """The counts are the whole state."""
    whole = draw(weights, [0] * len(weights), first + second).tolist()
    head = draw(weights, [0] * len(weights), first).tolist()
    counts = [head.count(corpus) for corpus in range(len(weights))]
    assert head + draw(weights, counts, second).tolist() == whole


def test_float_weights_keep_their_ratio():
    """Shares of 0.7, 0.2, 0.1 survive the scaling to integers to six digits."""
    scaled = integer_weights([7.0, 2.0, 1.0])
    assert [round(weight / sum(scaled), 5) for weight in scaled] == [0.7, 0.2, 0.1]
    assert min(integer_weights([1e-12, 1.0])) == 1

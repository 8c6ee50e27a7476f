"""The distribution of the next token is the one that the settings describe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from entrenar.infer.sampling import candidates, draw, penalize_repetition


def logits_of(seed: int, rows: int = 2, vocab: int = 30) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def dense(logits: torch.Tensor, **options: object) -> torch.Tensor:
    """The distribution over the whole vocabulary."""
    probabilities, tokens = candidates(logits, **options)
    return torch.zeros_like(logits).scatter(-1, tokens, probabilities.to(logits.dtype))


OPTIONS = {
    "temperature": st.floats(0.1, 5.0),
    "top_k": st.one_of(st.none(), st.integers(1, 40)),
    "top_p": st.floats(0.01, 1.0),
    "min_p": st.floats(0.0, 1.0),
}


@pytest.mark.property
@pytest.mark.kills("infer.sampling", "kept.topk(min(top_k, kept", "kept.topk(min(top_k + 1, kept")
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), **OPTIONS)
def test_distribution_equals_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    """All settings together give the distribution of transformers' own processors in their order."""
    logits = logits_of(seed)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        theirs.append(TopKLogitsWarper(top_k))
    theirs.append(TopPLogitsWarper(top_p))
    theirs.append(MinPLogitsWarper(min_p))
    expected = theirs(torch.zeros(2, 1, dtype=torch.long), logits.clone()).softmax(-1)
    ours = dense(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.property
@pytest.mark.kills("infer.sampling", "mass_before >= top_p", "mass_before + probabilities >= top_p")
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(seed: int, top_p: float) -> None:
    """The kept tokens reach the mass, and without the least likely of them they would not."""
    logits = logits_of(seed, rows=1)
    full, kept = logits.softmax(-1), dense(logits, top_p=top_p) > 0
    masses = full[kept]
    assert float(masses.sum()) >= top_p - 1e-12
    assert float(masses.sum() - masses.min()) < top_p
    assert float(masses.min()) >= float(full[~kept].max())


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    """Equal logits do not let more than k tokens in."""
    assert int((dense(torch.zeros(1, 9), top_k=4) > 0).sum()) == 4


def test_min_p_is_relative_to_the_likeliest() -> None:
    """A token stays if it is at least min_p times as likely as the likeliest."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    expected = torch.tensor([[0.625, 0.375, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dense(logits, min_p=0.31), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-2, 1e-30, 1e-300])
def test_small_temperature_is_greedy(temperature: float) -> None:
    """As the temperature goes to 0 all probability goes to the likeliest token, and nothing overflows."""
    logits = logits_of(3)
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 30).double()
    torch.testing.assert_close(dense(logits, temperature=temperature), expected, rtol=0, atol=1e-12)


@pytest.mark.property
@pytest.mark.kills("infer.sampling", "place.clamp(max=tokens.shape[-1] - 1)", "(place * 0 + tokens.shape[-1] - 1)")
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), **OPTIONS)
def test_draws_stay_in_the_allowed_set(
    seed: int, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    """No draw leaves the tokens that are kept."""
    logits, generator = logits_of(seed), torch.Generator().manual_seed(seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    allowed = dense(logits, **options) > 0
    kept = candidates(logits, **options)
    for _ in range(30):
        assert allowed.gather(-1, draw(*kept, generator)[:, None]).all()


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    """Frequencies approach the probabilities; the same seed draws the same, another seed does not."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(20000, 3)
    kept = candidates(logits)
    first = draw(*kept, torch.Generator().manual_seed(1))
    shares = first.bincount(minlength=3) / len(first)
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.02)
    assert torch.equal(first, draw(*kept, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, draw(*kept, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    """Seen tokens lose as in CTRL's reference: positive logits are divided, negative ones multiplied."""
    logits, ids = logits_of(4), torch.tensor([[1, 5, 5, 9], [0, 2, 3, 29]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter(1, ids, value=True)
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected, rtol=0, atol=0)

"""Reading token by token through the cache equals reading all at once."""

import pytest
import torch

from entrenar.errors import DataError
from entrenar.model import KVCache, Llama, LlamaConfig, RopeScaling
from entrenar.ops import Documents

SMALL = LlamaConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40, max_seq_len=16
)
STRETCHED = SMALL.model_copy(update={"max_seq_len": 6, "rope_scaling": RopeScaling(rope_type="dynamic", factor=4.0)})


def model_of(config: LlamaConfig) -> Llama:
    model = Llama(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return model


def cache_of(config: LlamaConfig, batch_size: int, max_len: int, starts: list[int] | None = None) -> KVCache:
    return KVCache(config, batch_size, max_len, starts=starts, dtype=torch.float64)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("config", [SMALL, STRETCHED], ids=["plain", "dynamic"])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [1, 10]])
@torch.no_grad()
def test_cached_reading_equals_reading_at_once(config: LlamaConfig, pieces: list[int]) -> None:
    """However a text is cut, the logits are those of the whole text."""
    model, input_ids = model_of(config), tokens(2, 11)
    cache = cache_of(config, 2, 11)
    logits = torch.cat([model(piece, cache=cache) for piece in input_ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(input_ids), rtol=0, atol=1e-11)
    assert cache.length == 11


@torch.no_grad()
def test_left_padding_has_no_influence() -> None:
    """A padded row gives the logits of its text alone, at the prompt and after it, token by token or in pieces."""
    model, rows = model_of(SMALL), tokens(3, 12)
    starts = [4, 0, 2]
    for pieces in ([6, 1, 1, 4], [12], [6, 6]):
        cache = cache_of(SMALL, 3, 12, starts)
        logits = torch.cat([model(piece, cache=cache) for piece in rows.split(pieces, dim=1)], dim=1)
        assert logits.isfinite().all()
        for row, start in enumerate(starts):
            alone = model(rows[row : row + 1, start:])
            torch.testing.assert_close(logits[row : row + 1, start:], alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_padding_is_known_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading padded prompts fetches nothing from the device: where each text begins is known before."""
    monkeypatch.setattr(Documents, "from_ids", lambda _: pytest.fail("waits for the device"))
    model, rows = model_of(SMALL), tokens(2, 6)
    cache = cache_of(SMALL, 2, 6, [2, 0])
    model(rows, cache=cache)
    assert cache.first_slots == (2, 0)
    assert cache.starts is not None
    assert cache.starts.tolist() == [2, 0]
    assert cache.spans(6) == (((0, 2), (2, 6)), ((0, 6),))
    assert cache.spans(1) == (((0, 1),), ((0, 1),))
    assert cache_of(SMALL, 2, 6, [0, 0]).starts is None


@torch.no_grad()
def test_cache_never_moves() -> None:
    """All tokens land in the memory taken at the start."""
    cache, model = cache_of(SMALL, 1, 8), model_of(SMALL)
    places = set()
    for token in tokens(1, 8).split(1, dim=1):
        model(token, cache=cache)
        places.add(cache.layers.data_ptr())
    assert len(places) == 1


def test_overfull_cache_is_refused() -> None:
    """A cache says how much it holds and how much came."""
    model, cache = model_of(SMALL), cache_of(SMALL, 1, 4)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(DataError, match=r"takes max_len = 4 tokens, got 3 \+ 2; make it longer"):
        model(tokens(1, 2), cache=cache)

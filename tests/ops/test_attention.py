"""Attention: causal to the bit, documents that never meet, grouped heads, caches, the oracle."""

import math

import pytest
import torch
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops import Documents, attention
from entrenar.ops.attention import (
    AttentionFunction,
    causal_mask,
    derived_attention,
    fused_attention,
    fused_attention_by_document,
    reference_attention,
)


def draw(
    generator, batch=2, heads=4, groups=2, queries=5, keys=None, width=3, dtype=torch.float64
) -> tuple[Tensor, ...]:
    shapes = [(heads, queries), (groups, keys or queries), (groups, keys or queries)]
    return tuple(torch.randn(batch, h, t, width, generator=generator, dtype=dtype).requires_grad_() for h, t in shapes)


def grads(function, inputs: tuple[Tensor, ...], dout: Tensor, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs, **options), inputs, dout)


def assert_same(function, other, inputs: tuple[Tensor, ...], generator) -> None:
    """Assert that two functions agree to float64 rounding, forward and backward."""
    y = other(*inputs)
    torch.testing.assert_close(function(*inputs), y, rtol=1e-12, atol=1e-13)
    dout = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    for got, want in zip(grads(function, inputs, dout), grads(other, inputs, dout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_fast_path_equals_the_derived_backward(block_size, heads, groups, generator):
    """Torch's kernel and equations (1) to (9) agree, however the queries are cut and the heads are grouped."""
    inputs = draw(generator, heads=heads, groups=groups)
    assert_same(attention, lambda *x: derived_attention(*x, block_size=block_size), inputs, generator)


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_a_cache_aligns_the_last_query_with_the_last_key(queries, generator):
    """With more keys than queries the output is the last rows of the whole, in all three paths."""
    q, k, v = draw(generator, queries=5)
    whole = attention(q, k, v)[:, :, -queries:]
    last = q[:, :, -queries:]
    for path in (attention, derived_attention, reference_attention):
        torch.testing.assert_close(path(last, k, v), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keys", [5, 7])
@pytest.mark.parametrize("block_size", [2, 128])
def test_derived_backward_is_the_derivative(keys, block_size, generator):
    """Central differences agree with equations (5) to (9), with and without a cache."""
    inputs = draw(generator, batch=1, heads=2, groups=1, keys=keys)

    def op(*x: Tensor) -> Tensor:
        return derived_attention(*x, block_size=block_size)

    assert torch.autograd.gradcheck(op, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("path", [attention, derived_attention])
def test_a_future_token_has_no_influence(path, generator):
    """Other keys, values and queries from place c on change no bit before c, and receive none of its gradient."""
    q, k, v = draw(generator)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 3:] = 50
    assert torch.equal(path(*changed)[:, :, :3], path(q, k, v)[:, :, :3])
    assert not torch.equal(path(*changed)[:, :, 3:], path(q, k, v)[:, :, 3:])
    dout = torch.ones_like(q)
    dout[:, :, 3:] = 0
    for grad in grads(path, (q, k, v), dout):
        assert torch.equal(grad[:, :, 3:], torch.zeros_like(grad[:, :, 3:]))
        assert grad[:, :, :3].abs().sum() > 0


def documents_of(*rows: str) -> Documents:
    return Documents.from_ids(torch.tensor([[int(place) for place in row] for row in rows]))


def test_a_packed_document_is_as_it_is_alone(generator):
    """Output and gradients of each packed document equal, to the bit, those of the document by itself."""
    q, k, v = draw(generator, queries=6)
    documents = documents_of("001112", "011122")
    dout = torch.randn(q.shape, generator=generator, dtype=q.dtype)
    packed = attention(q, k, v, documents=documents)
    packed_grads = torch.autograd.grad(packed, (q, k, v), dout)
    for row, spans in enumerate(documents.spans):
        for start, end in spans:
            piece = (slice(row, row + 1), slice(None), slice(start, end))
            alone = tuple(x[piece].detach().requires_grad_() for x in (q, k, v))
            assert torch.equal(attention(*alone), packed[piece])
            for got, want in zip(packed_grads, grads(attention, alone, dout[piece]), strict=True):
                assert torch.equal(got[piece], want)


def test_documents_by_split_equal_documents_by_span(generator):
    """The path for other devices, which splits and joins, gives what the CPU's spans give."""
    inputs = draw(generator, queries=6)
    documents = documents_of("001112", "011122")
    assert_same(
        lambda *x: attention(*x, documents=documents),
        lambda *x: fused_attention_by_document(*x, 3**-0.5, documents.spans),
        inputs,
        generator,
    )


def test_scale_is_one_over_the_root_of_the_width_unless_given(generator):
    """Leaving the scale out means K^(-1/2); another scale gives another result, the same in all paths."""
    q, k, v = draw(generator)
    assert torch.equal(attention(q, k, v), attention(q, k, v, scale=1 / math.sqrt(3)))
    other = attention(q, k, v, scale=0.1)
    assert not torch.allclose(other, attention(q, k, v))
    for path in (derived_attention, reference_attention):
        torch.testing.assert_close(path(q, k, v, scale=0.1), other, rtol=1e-12, atol=1e-13)


def test_output_lies_between_the_values(generator):
    """Each output is an average of the values it may see."""
    q, k, v = draw(generator)
    y = attention(q, k, v).unflatten(1, (2, 2))
    low, high = v.cummin(2).values[:, :, None], v.cummax(2).values[:, :, None]
    assert ((y >= low - 1e-12) & (y <= high + 1e-12)).all()


def test_large_scores_do_not_overflow(generator):
    """The softmax is shifted by its maximum in every path."""
    q, k, v = (x * 1e3 for x in draw(generator))
    for path in (attention, derived_attention):
        assert torch.isfinite(path(q, k, v)).all()


def test_float32_products_of_bfloat16_are_nearer_to_the_exact_result(generator):
    """compute_dtype=float32 rounds once: output and gradients in bfloat16 within one rounding of float64's."""
    exact = draw(generator, queries=33, width=16)
    inputs = tuple(x.detach().bfloat16().requires_grad_() for x in exact)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    y = attention(*inputs, compute_dtype=torch.float32)
    assert y.dtype == torch.bfloat16
    want = reference_attention(*exact).detach()
    assert float((y.detach() - want).norm() / want.norm()) < 2**-8
    dout = torch.randn(y.shape, generator=generator).bfloat16()
    pairs = zip(
        grads(attention, inputs, dout, compute_dtype=torch.float32),
        grads(reference_attention, exact, dout.double()),
        strict=True,
    )
    for got, grad in pairs:
        assert float((got - grad).norm() / grad.norm()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_path_saves_nothing_wider_than_its_inputs(dtype, generator):
    """What the backward keeps is q, k, v, out in their dtype and one number for each query."""
    q, k, v = draw(generator, dtype=torch.float32, queries=16, width=8)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(q, k, v, compute_dtype=torch.float32)
    assert [x.dtype for x in saved[:4]] == [dtype] * 4
    assert {x.dtype for x in saved[4:]} == {torch.float32}
    assert sum(x.numel() for x in saved) == 2 * q.numel() + 2 * k.numel() + q[..., 0].numel()


def test_derived_path_saves_no_probabilities(generator):
    """The hand-derived backward recomputes them: nothing of size T x S is saved."""
    q, k, v = draw(generator, batch=1, queries=40)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        AttentionFunction.apply(q, k, v, 1.0, 8)
    assert max(x.numel() for x in saved) == q.numel()


def test_derived_path_refuses_a_second_derivative(generator):
    """The oracle, too, has a first derivative only."""
    inputs = draw(generator)
    with pytest.raises(Exception, match=r"^attention has a first derivative only, .*$"):
        torch.autograd.grad(derived_attention(*inputs).sum(), inputs, create_graph=True)


def test_fused_path_equals_the_reference_without_a_span(generator):
    """The path for other devices agrees with plain torch."""
    inputs = draw(generator)
    assert_same(lambda *x: fused_attention(*x, 3**-0.5), reference_attention, inputs, generator)


def test_mask_shows_the_past_and_the_token_itself():
    """Rows are queries, columns are keys, aligned at the end."""
    assert causal_mask(2, 3).tolist() == [[True, True, False], [True, True, True]]


def test_heads_must_divide_into_groups(generator):
    """A query head without a key head has nothing to read."""
    with pytest.raises(DataError, match=r"^query heads must be a multiple of key/value heads, got 3 and 2$"):
        attention(*draw(generator, heads=3))


def test_more_queries_than_keys_are_refused(generator):
    """A query before the first key would see nothing."""
    with pytest.raises(
        DataError, match=r"^attention needs at least as many keys as queries, got 4 keys and 5 queries$"
    ):
        attention(*draw(generator, keys=4))


@pytest.mark.parametrize(("rows", "keys"), [(("00111",), 5), (("0011", "0011"), 5), (("00111", "00111"), 6)])
def test_documents_must_fit_the_batch(rows, keys, generator):
    """Documents of another shape, or together with a cache, are refused with both shapes."""
    message = rf"^documents must cover each of the \(B, T\) = \(2, 5\) queries and {keys} keys, got .*$"
    with pytest.raises(DataError, match=message):
        attention(*draw(generator, keys=keys), documents=documents_of(*rows))

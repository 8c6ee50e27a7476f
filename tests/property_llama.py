"""The specification's list of properties (section 2.2), each on production code, each with a mutant that it kills.

`make property-power` plants each mutant and demands that the property fails; `make property-10k` runs 10,000 counted
cases each. Permutation equivariance is claimed where it holds: for attention without mask and positions. Tolerances
are stated in float64 and leave about a hundred roundings.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import ops
from entrenar.infer.sampling import candidates, draw
from entrenar.model import KVCache, Llama, LlamaConfig
from entrenar.ops.attention import derived_attention
from entrenar.peft import LoraConfig, from_base, merge, unmerge

from .mutants import changed, source_of
from .strategies import normal, seeds

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
ATTENTION, LOSS, LORA, NF4 = "ops.attention", "ops.linear_cross_entropy", "ops.lora_linear", "ops.quantized.nf4"
times = st.integers(1, 12)
heads_in_groups = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (6, 1)])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **CLOSE)


def attention_inputs(seed: int, heads: tuple[int, int], time: int, width: int = 4, batch: int = 2) -> list[Tensor]:
    counts = (heads[0], heads[1], heads[1])
    return [normal(seed + place, batch, count, time, width) for place, count in enumerate(counts)]


def gradients(y: Tensor, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "out = join(outs, pieces, q)\n", "out = join(outs, pieces, q)[..., :-1]\n")
@given(
    st.integers(1, 8), st.integers(1, 128), st.sampled_from([64, 128, 256, 512]), st.sampled_from([1, 2, 4, 8]), seeds()
)
def test_attention_keeps_its_shape(batch, time, hidden, heads, seed):
    """For 1 to 8 rows of 1 to 128 tokens and widths 64 to 512 the output is finite and shaped as the queries."""
    q = normal(seed, batch, heads, time, hidden // heads, dtype=torch.float32)
    y = ops.attention(q, q, q)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert y.isfinite().all()


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "is_causal=queries == keys", "is_causal=True")
@given(seeds(), heads_in_groups, st.integers(2, 10), st.randoms(use_true_random=False))
def test_unmasked_attention_is_equivariant_under_permutations(seed, heads, time, random):
    """Each query alone sees all keys; permuting the tokens then permutes the output and nothing else."""
    order = list(range(time))
    random.shuffle(order)
    q, k, v = attention_inputs(seed, heads, time, batch=1)

    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        every = q.transpose(0, 2)  # (T, H, 1, K): a row of the batch for each query
        return ops.attention(every, k.expand(time, -1, -1, -1), v.expand(time, -1, -1, -1)).transpose(0, 2)

    close(unmasked(q[:, :, order], k[:, :, order], v[:, :, order]), unmasked(q, k, v)[:, :, order])


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "*inputs, is_causal=True, scale=scale", "*inputs, is_causal=False, scale=scale")
@given(seeds(), heads_in_groups, st.integers(2, 12), st.data())
def test_a_later_token_has_no_influence(seed, heads, time, data):
    """Other keys and values from a place on change no bit before it."""
    at = data.draw(st.integers(1, time - 1))
    q, k, v = attention_inputs(seed, heads, time)
    others = [torch.cat((x[:, :, :at], x[:, :, at:] * -3 + 1), dim=2) for x in (q, k, v)]
    assert torch.equal(ops.attention(*others)[:, :, :at], ops.attention(q, k, v)[:, :, :at])


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "logsumexp, 0.0, is_causal=True", "logsumexp, 0.0, is_causal=False")
@given(seeds(), heads_in_groups, st.integers(2, 12), st.data())
def test_a_later_token_gets_no_gradient(seed, heads, time, data):
    """The gradient of the first outputs by later tokens is zero to the bit."""
    at = data.draw(st.integers(1, time - 1))
    inputs = leaves(*attention_inputs(seed, heads, time))
    dy = normal(seed + 7, *inputs[0].shape)
    dy[:, :, at:] = 0
    assert not any(grad[:, :, at:].any() for grad in gradients(ops.attention(*inputs), dy, *inputs))


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "return allowed.tril(num_keys - num_queries)",
                   "return allowed.tril(0)")  # fmt: skip
@given(seeds(), heads_in_groups, st.integers(2, 12), st.data())
def test_a_cache_gives_the_last_rows_of_the_whole(seed, heads, time, data):
    """The last queries over all keys are the last rows of the whole attention."""
    last = data.draw(st.integers(1, time))
    q, k, v = attention_inputs(seed, heads, time)
    close(ops.attention(q[:, :, -last:], k, v), ops.attention(q, k, v)[:, :, -last:])


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
                   "x.flip(1).reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])")  # fmt: skip
@given(seeds(), st.sampled_from([(2, 1), (4, 2), (6, 3), (6, 2)]), times)
def test_grouped_heads_are_repeated_heads(seed, heads, time):
    """Grouped-query attention, by kernel and by formula, is attention with each key head given to its query heads."""
    q, k, v = attention_inputs(seed, heads, time)
    repeated = [x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v)]
    want = ops.attention(q, *repeated)
    close(ops.attention(q, k, v), want)
    close(derived_attention(q, k, v, block_size=3), want)


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "outs.append(out.to(q.dtype))", "outs.append(out.to(q.dtype) * 1.01)")
@given(seeds(), heads_in_groups, times)
def test_attention_lies_between_its_values(seed, heads, time):
    """Each output is an average of the values it may see."""
    q, k, v = attention_inputs(seed, heads, time)
    values = v.repeat_interleave(heads[0] // heads[1], 1)
    y = ops.attention(q, k, v)
    assert (y <= values.cummax(2).values + 1e-12).all()
    assert (y >= values.cummin(2).values - 1e-12).all()


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "outs.append(out.to(q.dtype))", "outs.append(out.to(q.dtype) + 0.001)")
@given(seeds(), heads_in_groups, times, st.floats(-3, 3))
def test_attention_is_linear_in_its_values(seed, heads, time, factor):
    """A combination of values gives the combination of the outputs."""
    q, k, v = attention_inputs(seed, heads, time)
    w = normal(seed + 9, *v.shape)
    close(ops.attention(q, k, v + factor * w), ops.attention(q, k, v) + factor * ops.attention(q, k, w))


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "documents.spans, compute_dtype or q.dtype)", "(), compute_dtype or q.dtype)")
@given(seeds(), heads_in_groups, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_packed_document_is_as_it_is_alone(seed, heads, lengths):
    """Forward and gradients of each document equal those of the document by itself, to the bit."""
    time = sum(lengths)
    ids = torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]] * 2)
    inputs = leaves(*attention_inputs(seed, heads, time))
    dy = normal(seed + 5, *inputs[0].shape)
    y = ops.attention(*inputs, documents=ops.Documents.from_ids(ids))
    packed = gradients(y, dy, *inputs)
    start = 0
    for length in lengths:
        mine = slice(start, start + length)
        alone = leaves(*(x.detach()[:1, :, mine] for x in inputs))
        out = ops.attention(*alone)
        assert torch.equal(out, y[:1, :, mine])
        for got, want in zip(packed, gradients(out, dy[:1, :, mine], *alone), strict=True):
            assert torch.equal(got[:1, :, mine], want)
        start += length


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "dq = dscores @ k * scale", "dq = dscores @ k")
@given(seeds(), heads_in_groups, times, st.integers(1, 13))
def test_kernel_and_formula_agree(seed, heads, time, block_size):
    """Torch's kernel and the derived backward, by blocks of any size, give the same output and gradients."""
    inputs = leaves(*attention_inputs(seed, heads, time))
    dy = normal(seed + 5, *inputs[0].shape)
    fast, derived = ops.attention(*inputs), derived_attention(*inputs, block_size=block_size)
    close(fast, derived)
    for a, b in zip(gradients(fast, dy, *inputs), gradients(derived, dy, *inputs), strict=True):
        close(a, b)


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "weights = torch.exp(scores - shift)", "weights = torch.exp(scores - shift) + 0.01")
@given(seeds(), heads_in_groups, st.integers(2, 12))
def test_one_vector_added_to_all_keys_changes_nothing(seed, heads, time):
    """It adds the same number to all scores of a query, which a softmax forgets."""
    q, k, v = attention_inputs(seed, heads, time)
    moved = k + 20 * normal(seed + 4, 1, heads[1], 1, 4)
    torch.testing.assert_close(ops.attention(q, moved, v), ops.attention(q, k, v), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(derived_attention(q, moved, v), ops.attention(q, k, v), rtol=1e-10, atol=1e-10)


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "outs.append(out.to(q.dtype))", "outs.append(out.to(q.dtype).flip(0))")
@given(seeds(), heads_in_groups, times)
def test_rows_of_a_batch_do_not_meet(seed, heads, time):
    """A row gives what it gives alone."""
    inputs = attention_inputs(seed, heads, time, batch=3)
    close(ops.attention(*inputs)[:1], ops.attention(*(x[:1] for x in inputs)))


def angles(positions: Tensor, half: int) -> tuple[Tensor, Tensor]:
    turns = positions.double()[None, :, None] * 10 ** -torch.arange(half).double()
    return turns.cos(), turns.sin()


@pytest.mark.property("rope")
@pytest.mark.kills("ops.rope", "first * cos - second * sin", "first * cos + second * sin")
@given(seeds(), times, st.integers(1, 6), st.integers(0, 5000))
def test_a_rotation_keeps_lengths_and_has_an_inverse(seed, time, half, start):
    """Every head keeps its length, and the opposite angles bring it back."""
    x = normal(seed, 2, 3, time, 2 * half)
    cos, sin = angles(torch.arange(time) + start, half)
    close(ops.rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    close(ops.rope(ops.rope(x, cos, sin), cos, -sin), x)


@pytest.mark.property("rope")
@pytest.mark.kills("ops.rope", "second * cos + first * sin", "second * cos - first * sin")
@given(seeds(), times, st.integers(1, 6), st.integers(0, 2000))
def test_products_depend_on_distance_alone(seed, time, half, shift):
    """Moving all positions by the same amount leaves every product of query and key."""
    q, k = normal(seed, 1, 2, time, 2 * half), normal(seed + 1, 1, 2, time, 2 * half)
    products = [
        ops.rope(q, *table) @ ops.rope(k, *table).mT
        for table in (angles(torch.arange(time), half), angles(torch.arange(time) + shift, half))
    ]
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)


@pytest.mark.property("rope")
@pytest.mark.kills("ops.rope", "rope_forward(dfirst, dsecond, cos, -sin)", "rope_forward(dfirst, dsecond, cos, sin)")
@given(seeds(), times, st.integers(1, 6))
def test_the_rotations_gradient_is_the_rotation_back(seed, time, half):
    """An orthogonal map's transpose is its inverse."""
    (x,) = leaves(normal(seed, 2, 3, time, 2 * half))
    cos, sin = angles(torch.arange(time) * 3, half)
    dy = normal(seed + 1, *x.shape)
    close(gradients(ops.rope(x, cos, sin), dy, x)[0], ops.rope(dy, cos, -sin))


widths = st.integers(1, 40)


@pytest.mark.property("rms_norm")
@pytest.mark.kills(
    "ops.rms_norm", "(x * x).mean(-1, keepdim=True) + eps)  # (1)", "(x * x).sum(-1, keepdim=True) + eps)  # (1)"
)
@given(seeds(), widths, st.floats(0, 1), st.floats(0.01, 100))
def test_a_normalized_row_has_root_mean_square_at_most_one(seed, width, eps, scale):
    """Exactly one without eps, less with it."""
    y = ops.rms_norm(normal(seed, 3, width, scale=scale), torch.ones(width, dtype=torch.float64), eps)
    assert (y.square().mean(-1) <= 1 + 1e-12).all()
    close(ops.rms_norm(y, torch.ones(width, dtype=torch.float64), 0.0).square().mean(-1), torch.ones(3).double())


@pytest.mark.property("rms_norm")
@pytest.mark.kills("ops.rms_norm", "return x * rstd * weight, rstd", "return x * weight, rstd")
@given(seeds(), widths, st.integers(-20, 20))
def test_the_norm_forgets_a_power_of_two(seed, width, exponent):
    """Without eps it changes no bit."""
    x, weight = normal(seed, 3, width), normal(seed + 1, width)
    assert torch.equal(ops.rms_norm(x * 2.0**exponent, weight, 0.0), ops.rms_norm(x, weight, 0.0))


@pytest.mark.property("rms_norm")
@pytest.mark.kills("ops.rms_norm", "rstd * rstd * rstd / x.shape[-1]", "rstd * rstd * rstd")
@given(seeds(), st.integers(2, 40))
def test_the_norms_gradient_is_orthogonal_to_its_input(seed, width):
    """What forgets the scale of x has no gradient along x."""
    x, weight = leaves(normal(seed, 3, width), normal(seed + 1, width))
    dx, _ = gradients(ops.rms_norm(x, weight, 0.0), normal(seed + 2, 3, width), x, weight)
    close((dx * x).sum(-1), torch.zeros(3, dtype=torch.float64))


@pytest.mark.property("rms_norm")
@pytest.mark.kills("ops.rms_norm", "return x * rstd * weight, rstd", "return x * rstd * weight.flip(0), rstd")
@given(seeds(), st.integers(2, 40), st.randoms(use_true_random=False))
def test_the_norm_is_equivariant_in_its_features(seed, width, random):
    """Features in another order, with their weights, give the output in that order."""
    order = list(range(width))
    random.shuffle(order)
    x, weight = normal(seed, 3, width), normal(seed + 1, width)
    close(ops.rms_norm(x[:, order], weight[order], 0.1), ops.rms_norm(x, weight, 0.1)[:, order])


@pytest.mark.property("swiglu")
@pytest.mark.kills("ops.swiglu", "return silu(gate).mul_(up)  # (1)", "return torch.sigmoid(gate).mul_(up)")
@given(seeds(), widths, st.floats(0.1, 50))
def test_silu_of_a_number_and_its_negative_differ_by_the_number(seed, width, scale):
    """An identity of no other gate in use."""
    x = normal(seed, 3, width, scale=scale)
    torch.testing.assert_close(
        ops.swiglu(x, torch.ones_like(x)) - ops.swiglu(-x, torch.ones_like(x)), x, rtol=1e-13, atol=1e-13
    )


@pytest.mark.property("swiglu")
@pytest.mark.kills("ops.swiglu", "dup = silu(gate).mul_(dy)  # (2)", "dup = gate.sigmoid().mul_(dy)")
@given(seeds(), widths)
def test_the_gated_activation_is_linear_in_up(seed, width):
    """So its gradient by up, times up, is the output."""
    gate, up = leaves(normal(seed, 3, width), normal(seed + 1, 3, width))
    y = ops.swiglu(gate, up)
    close(gradients(y, torch.ones_like(y), gate, up)[1] * up, y)


def loss_case(seed: int, tokens: int, vocab: int, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    return normal(seed, tokens, width), normal(seed + 1, vocab, width), targets


sizes = {"seed": seeds(), "tokens": st.integers(1, 20), "vocab": st.integers(2, 30)}


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "return out.addmm_(a, b) if", "return torch.mm(a, b, out=out) if")
@given(chunk=st.integers(1, 21), **sizes)
def test_chunked_loss_is_the_dense_loss(seed, tokens, vocab, chunk):
    """However the tokens are cut, loss and gradients are those of the dense logits."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    x, weight = leaves(x, weight)
    got = ops.linear_cross_entropy(x, weight, targets, chunk_size=chunk)
    want = torch.nn.functional.cross_entropy(x @ weight.mT, targets, reduction="sum")
    close(got, want)
    for a, b in zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True):
        close(a, b)


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "torch.log_softmax(logits, dim=-1, out=logits)", "logits")
@given(**sizes)
def test_one_vector_added_to_the_whole_head_changes_nothing(seed, tokens, vocab):
    """It adds the same number to all logits of a token."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    moved = weight + 10 * normal(seed + 2, 1, 5)
    loss = ops.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(ops.linear_cross_entropy(x, moved, targets), loss, rtol=1e-11, atol=1e-11)


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "places.new_full(places.shape, -1,", "places.new_full(places.shape, -2,")
@given(**sizes)
def test_the_heads_gradient_sums_to_zero(seed, tokens, vocab):
    """Probabilities sum to one, and so does the one-hot that is subtracted."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    x, weight = leaves(x, weight)
    _, dweight = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), (x, weight))
    torch.testing.assert_close(dweight.sum(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "loss -= log_probabilities", "loss += log_probabilities")
@given(**sizes)
def test_knowing_nothing_costs_the_logarithm_of_the_vocabulary(seed, tokens, vocab):
    """With logits all alike each target costs log V; no loss is negative."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    assert ops.linear_cross_entropy(x, weight, targets) >= 0
    same = ops.linear_cross_entropy(torch.zeros_like(x), weight, targets)
    assert float(same) == pytest.approx(tokens * math.log(vocab), rel=1e-12)


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(
    LOSS,
    "kept = (targets != ignore_index).nonzero()",
    "targets = targets.clamp_min(0)\n    kept = (targets != ignore_index).nonzero()",
)
@given(**sizes)
def test_an_ignored_token_has_no_influence(seed, tokens, vocab):
    """Neither on the loss nor, in its own row, by a gradient."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    ignored = normal(seed + 3, tokens) > 0
    masked = targets.masked_fill(ignored, -100)
    (x,) = leaves(x)
    loss = ops.linear_cross_entropy(x, weight, masked)
    close(loss, ops.linear_cross_entropy(x[~ignored], weight, targets[~ignored]))
    assert not gradients(loss, torch.ones_like(loss), x)[0][ignored].any()


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "return loss\n\n    @staticmethod", "return loss / len(x)\n\n    @staticmethod")
@given(cut=st.integers(1, 19), **{**sizes, "tokens": st.integers(2, 20)})
def test_a_split_batch_has_the_loss_of_the_whole(seed, tokens, vocab, cut):
    """The loss is a sum over targets, so its parts add up."""
    x, weight, targets = loss_case(seed, tokens, vocab)
    parts = [ops.linear_cross_entropy(x[part], weight, targets[part]) for part in (slice(0, cut), slice(cut, None))]
    close(parts[0] + parts[1], ops.linear_cross_entropy(x, weight, targets))


def adapter_case(seed: int, rank: int, rows: int = 4) -> list[Tensor]:
    shapes = ((rows, 7), (6, 7), (rank, 7), (6, rank))
    return [normal(seed + place, *shape) for place, shape in enumerate(shapes)]


adapters = {"seed": seeds(), "rank": st.integers(1, 5), "dropout": st.sampled_from([0.0, 0.1, 0.5])}


@pytest.mark.property("lora_linear")
@pytest.mark.kills(
    LORA, "linear_forward(rows,", "linear_forward(rows if kept is None else rows * kept.reshape(rows.shape),"
)
@given(**adapters)
def test_an_adapter_that_has_learned_nothing_changes_nothing(seed, rank, dropout):
    """With B = 0 the output is the frozen product's to the bit; A gets a gradient of zero and B one that is not."""
    x, weight, a, b = leaves(*adapter_case(seed, rank))
    y = ops.lora_linear(x, weight, a, b * 0, scale=2.0, dropout=dropout, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(y, ops.linear(x, weight))
    assert not gradients(y, normal(seed + 5, *y.shape), a)[0].any()


@pytest.mark.property("lora_linear")
@pytest.mark.kills(LORA, "y.addmm_(low, lora_b.mT, alpha=scale)", "y.addmm_(low, lora_b.mT)")
@given(scale=st.floats(-4, 4), **adapters)
def test_an_adapter_is_a_change_of_the_weight(seed, rank, dropout, scale):
    """Without dropout the product is that with W + s B A."""
    x, weight, a, b = adapter_case(seed, rank)
    close(ops.lora_linear(x, weight, a, b, scale=scale), ops.linear(x, weight + scale * b @ a))


@pytest.mark.property("lora_linear")
@pytest.mark.kills(LORA, "dx.addcmul_(product, kept.to(dx.dtype))", "dx.add_(product)")
@given(**adapters)
def test_the_adapters_product_is_bilinear_forward_and_backward(seed, rank, dropout):
    """The gradients by the factors of a product, times the factors, are the output."""
    x, weight, a, b = leaves(*adapter_case(seed, rank))
    y = ops.lora_linear(x, weight, a, b, scale=1.5, dropout=dropout, generator=torch.Generator().manual_seed(seed))
    dy = normal(seed + 5, *y.shape)
    dx, dweight, da, db = gradients(y, dy, x, weight, a, b)
    torch.testing.assert_close((dx * x).sum(), (dy * y).sum(), rtol=1e-11, atol=1e-11)  # linear in x
    torch.testing.assert_close((dweight * weight).sum() + (da * a).sum(), (dy * y).sum(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((da * a).sum(), (db * b).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.property("quantized_linear")
@pytest.mark.kills(NF4, "thresholds = (book[:-1] + book[1:]) / 2", "thresholds = book[:-1] + 0.001")
@given(seeds(), st.integers(1, 12), st.integers(1, 40), st.integers(-30, 30))
def test_a_quantized_weight_is_near_and_keeps_its_codes(seed, rows, width, exponent):
    """Each number is off by at most 0.152 of its block's magnitude and what the scale's own rounding adds."""
    weight = normal(seed, rows, width, dtype=torch.float32, scale=2.0**exponent)
    quantized = ops.quantize_nf4(weight)
    wide = ops.dequantize_nf4(quantized)
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    magnitudes = blocks.abs().amax(1)
    spread = (magnitudes - magnitudes.mean()).abs().max()
    bound = (0.15191 * magnitudes + spread / 50 + 1e-6 * magnitudes).repeat_interleave(64)[: weight.numel()]
    assert ((wide - weight).flatten().abs() <= bound).all()


@pytest.mark.property("quantized_linear")
@pytest.mark.kills(
    NF4, "return magnitudes, levels[::2] << 4 | levels[1::2]", "return magnitudes, levels[1::2] << 4 | levels[::2]"
)
@given(seeds(), st.integers(1, 12), st.integers(1, 40))
def test_quantizing_twice_is_quantizing_once(seed, rows, width):
    """What has been quantized once keeps every code."""
    once = ops.quantize_nf4(normal(seed, rows, width, dtype=torch.float32))
    again = ops.quantize_nf4(ops.dequantize_nf4(once))
    assert torch.equal(again.codes, once.codes)


@pytest.mark.property("quantized_linear")
@pytest.mark.kills("ops.quantized.linear", "dx.addmm_(dy[:, columns], tile)", "dx.addmm_(dy[:, : tile.shape[0]], tile)")
@given(seeds(), st.integers(1, 12), st.integers(1, 30), st.integers(1, 13))
def test_a_product_by_tiles_is_the_product(seed, rows, width, tile_rows):
    """However many rows are widened at a time, it is the product with the widened weight, forward and backward."""
    quantized = ops.quantize_nf4(normal(seed, rows, width, dtype=torch.float32))
    (x,) = leaves(normal(seed + 1, 3, width))
    y = ops.quantized_linear(x, quantized, tile_rows=tile_rows)
    wide = ops.dequantize_nf4(quantized, torch.float64)
    close(y, x @ wide.mT)
    dy = normal(seed + 2, *y.shape)
    close(gradients(y, dy, x)[0], dy @ wide)


def model_of(seed: int, heads: tuple[int, int] = (2, 1), layers: int = 2, *, tied: bool = False) -> Llama:
    config = LlamaConfig(
        vocab_size=23, hidden_size=4 * heads[0], num_layers=layers, num_heads=heads[0], num_kv_heads=heads[1],
        intermediate_size=11, max_seq_len=32, initializer_range=0.5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Llama(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def ids_of(seed: int, batch: int, time: int) -> Tensor:
    return torch.randint(0, 23, (batch, time), generator=torch.Generator().manual_seed(seed))


def all_gradients(model: Llama, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


CASES = settings.default.max_examples if settings.default is not None else 100
# A whole model costs a hundred operations: a fourth of the cases, but for the profile that counts to 10,000.
whole_model = settings(max_examples=CASES if CASES >= 10_000 else max(5, CASES // 4))
models = {"seed": seeds(), "heads": st.sampled_from([(1, 1), (2, 1), (4, 2)]), "time": st.integers(2, 8)}


@pytest.mark.property("attention", "rope")
@pytest.mark.kills("model.llama", "return self.logits(self.hidden(input_ids, documents=documents, cache=cache))",
                   "return self.logits(self.hidden(input_ids, documents=documents, cache=cache))[:, 1:]")  # fmt: skip
@whole_model
@given(batch=st.integers(1, 3), **models)
def test_the_model_gives_a_logit_for_each_token_and_word(seed, heads, time, batch):
    """(B, T) ids become finite (B, T, V) logits."""
    logits = model_of(seed, heads)(ids_of(seed, batch, time))
    assert logits.shape == (batch, time, 23)
    assert logits.isfinite().all()


@pytest.mark.property("attention")
@pytest.mark.kills(ATTENTION, "*inputs, is_causal=True, scale=scale", "*inputs, is_causal=False, scale=scale")
@whole_model
@given(**models)
def test_the_model_never_sees_the_next_token(seed, heads, time):
    """Another last token changes no logit before it."""
    model, ids = model_of(seed, heads), ids_of(seed, 2, time)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 5) % 23
    assert torch.equal(model(other)[:, :-1], model(ids)[:, :-1])


@pytest.mark.property("attention", "rope")
@pytest.mark.kills("model.llama", "documents=context.documents", "documents=None")
@whole_model
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=3), seed=seeds(), heads=models["heads"])
def test_the_model_reads_a_packed_document_as_it_is_alone(seed, heads, lengths):
    """Logits of each document in a packed row are those of the document by itself."""
    model, ids = model_of(seed, heads), ids_of(seed, 1, sum(lengths))
    numbers = torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]])
    packed = model(ids, documents=ops.document_spans(numbers))
    start = 0
    for length in lengths:
        close(packed[:, start : start + length], model(ids[:, start : start + length]))
        start += length


@pytest.mark.property("attention", "rope")
@pytest.mark.kills("model.llama", "return Context(cos[None, start:end], sin[None, start:end], cache=cache)",
                   "return Context(cos[None, : end - start], sin[None, : end - start], cache=cache)")  # fmt: skip
@whole_model
@given(cut=st.integers(1, 7), **models)
def test_decoding_with_a_cache_is_reading_at_once(seed, heads, time, cut):
    """In two pieces through the cache, the last piece has the logits of the whole."""
    model, ids = model_of(seed, heads), ids_of(seed, 2, time)
    cut = min(cut, time - 1)
    cache = KVCache(model.config, batch_size=2, max_len=time, dtype=torch.float64)
    with torch.no_grad():
        model(ids[:, :cut], cache=cache)
        close(model(ids[:, cut:], cache=cache), model(ids)[:, cut:])


@pytest.mark.property("attention", "swiglu", "rms_norm")
@pytest.mark.kills(
    "model.llama",
    "recomputed(self._mlp_half, x)",
    "recomputed(self._mlp_half, x.detach())",
)
@whole_model
@given(kind=st.sampled_from(["selective", "full"]), **models)
def test_recomputed_activations_change_no_bit(seed, heads, time, kind):
    """Loss and gradients with activation checkpointing are those without."""
    model, ids = model_of(seed, heads), ids_of(seed, 2, time)
    results = []
    for checkpointing in ("none", "selective", kind):
        model.checkpointing = checkpointing
        loss = model.loss(ids, ids.roll(-1, 1))
        results.append([loss, *all_gradients(model, loss)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(LOSS, "scaled[block] = grad[block] * scale", "scaled[block] = grad[block] * scale / len(grad)")
@whole_model
@given(cut=st.integers(1, 2), tied=st.booleans(), **models)
def test_a_batch_cut_into_micro_batches_has_the_gradient_of_the_whole(seed, heads, time, cut, tied):
    """With unequal numbers of targets, the gradients of the pieces add up to the batch's."""
    model, ids = model_of(seed, heads, tied=tied), ids_of(seed, 3, time)
    targets = ids.roll(-1, 1)
    targets[0, 1:] = -100
    whole = all_gradients(model, model.loss(ids, targets))
    parts = [all_gradients(model, model.loss(ids[part], targets[part])) for part in (slice(0, cut), slice(cut, 3))]
    for a, *b in zip(whole, *parts, strict=True):
        close(a, b[0] + b[1])


@pytest.mark.property("linear_cross_entropy")
@pytest.mark.kills(
    "model.llama",
    "            asked.ids,\n",
    "            asked.ids.roll(1),\n",
)
@whole_model
@given(**models)
def test_the_loss_is_that_of_the_logits(seed, heads, time):
    """The loss that never holds the logits is the cross entropy of the logits."""
    model, ids = model_of(seed, heads), ids_of(seed, 2, time)
    targets = ids_of(seed + 1, 2, time)
    want = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    close(model.loss(ids, targets), want)


@pytest.mark.property("attention", "rms_norm")
@pytest.mark.kills("ops.rms_norm", "rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)  # (1)",
                   "rstd = torch.rsqrt((x * x).mean() + eps).expand(len(x), 1)")  # fmt: skip
@whole_model
@given(**models)
def test_the_model_is_equivariant_in_the_rows_of_a_batch(seed, heads, time):
    """Rows in another order give their logits in that order."""
    model, ids = model_of(seed, heads), ids_of(seed, 3, time)
    order = [2, 0, 1]
    close(model(ids[order]), model(ids)[order])
    close(model(ids[:1]), model(ids)[:1])


@pytest.mark.property("lora_linear")
@pytest.mark.kills("peft.layers", "lora_b, lora_a, alpha=self.scale)", "lora_b, lora_a)")
@whole_model
@given(rank=st.integers(1, 4), alpha=st.integers(5, 9), **models)
def test_a_merged_model_is_the_adapted_one(seed, heads, time, rank, alpha):
    """Merging changes no logit beyond rounding, and taking it out again brings back every bit."""
    model, ids = model_of(seed, heads), ids_of(seed, 2, time)
    plain = model(ids)
    config = LoraConfig(rank=rank, lora_alpha=alpha)
    from_base(model, config, torch.Generator().manual_seed(seed))
    assert torch.equal(model(ids), plain)
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(normal(seed + place, *parameter.shape))
    adapted = model(ids)
    merge(model)
    torch.testing.assert_close(model(ids), adapted, rtol=1e-6, atol=1e-6)
    unmerge(model)
    assert torch.equal(model(ids), adapted)


@pytest.mark.property
@pytest.mark.kills(
    "infer.sampling",
    "return probabilities / probabilities.sum(-1, keepdim=True), tokens",
    "return probabilities, tokens",
)
@given(seeds(), st.integers(4, 128), st.floats(0.05, 20), st.floats(0.01, 1), st.floats(0, 1))
def test_a_softmax_is_a_distribution(seed, vocab, temperature, top_p, min_p):
    """Whatever is cut off, probabilities lie in [0, 1] and sum to 1 within 1e-5 (the specification's section 2.8)."""
    scores = normal(seed, 3, vocab, dtype=torch.float32)
    probabilities, _ = candidates(scores, temperature=temperature, top_p=top_p, min_p=min_p)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert ((probabilities.sum(-1) - 1).abs() < 1e-5).all()


@pytest.mark.property
@pytest.mark.kills("infer.sampling", "kept.topk(min(top_k, kept", "kept.topk(min(top_k + 1, kept")
@given(seeds(), st.integers(1, 20), st.integers(1, 20))
def test_a_draw_never_leaves_the_likeliest(seed, vocab, top_k):
    """With top-k every drawn token is among the k likeliest."""
    scores = normal(seed, 4, vocab)
    drawn = draw(*candidates(scores, top_k=top_k), torch.Generator().manual_seed(seed))
    least = scores.topk(min(top_k, vocab)).values[:, -1]
    assert (scores.gather(-1, drawn[:, None])[:, 0] >= least).all()


def test_every_property_names_a_mutant_of_its_source(request):
    """At least 25 properties stand here; each one that was collected names a text that its source has once."""
    collected = [item for item in request.session.items if item.get_closest_marker("property")]
    assert sum(hasattr(value, "hypothesis") for value in globals().values()) >= 25
    for item in collected:
        module, old, new = item.get_closest_marker("kills").args
        assert changed(source_of(f"entrenar.{module}"), old, new), item.name

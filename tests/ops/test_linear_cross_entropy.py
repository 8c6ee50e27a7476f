"""The head and its loss: chunked is dense, and the dense logits never exist."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar.errors import ConfigError, DataError
from entrenar.ops import linear_cross_entropy
from entrenar.ops.linear_cross_entropy import (
    default_chunk_size,
    reference_linear_cross_entropy,
)

loss_file = importlib.import_module("entrenar.ops.linear_cross_entropy")  # the package's name is the function's


class Recorder(TorchDispatchMode):
    """Remembers the operators that ran and the largest tensor that one of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max(
            self.largest, *(r.untyped_storage().nbytes() for r in results if isinstance(r, torch.Tensor)), 0
        )
        return result


def example(generator, tokens=13, width=4, vocab=7, dtype=torch.float64):
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 13, 14, 1000, None])
def test_every_chunk_size_gives_the_dense_loss_and_gradients(chunk_size, generator):
    """How the tokens are cut, into whatever last chunk, changes nothing."""
    x, weight, targets = example(generator)
    targets[3] = -100
    loss = linear_cross_entropy(x, weight, targets, chunk_size=chunk_size)
    want = reference_linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    pairs = zip(torch.autograd.grad(loss / 3, (x, weight)), torch.autograd.grad(want / 3, (x, weight)), strict=True)
    for got, grad in pairs:
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-13)


def test_dense_logits_are_never_allocated(generator):
    """No tensor of forward or backward is as large as (N, V); the largest is the chunk's buffer or the weight."""
    tokens, width, vocab, chunk_size = 96, 8, 64, 8
    x, weight, targets = example(generator, tokens, width, vocab)
    with Recorder() as recorded:
        linear_cross_entropy(x, weight, targets, chunk_size=chunk_size).backward()
    assert recorded.largest == 8 * max(chunk_size * vocab, tokens * width, vocab * width)
    assert recorded.largest < 8 * tokens * vocab
    with Recorder() as recorded:
        reference_linear_cross_entropy(x, weight, targets)
    assert recorded.largest == 8 * tokens * vocab  # the recorder sees such a tensor where there is one


def test_ignored_rows_cost_nothing(generator):
    """Rows without a target are gone before the first product: the loss of the others alone, to the bit."""
    x, weight, targets = example(generator)
    kept = torch.tensor([1, 4, 9])
    masked = torch.full_like(targets, -100)
    masked[kept] = targets[kept]
    with Recorder() as recorded:
        loss = linear_cross_entropy(x, weight, masked, chunk_size=100)
    assert torch.equal(loss, linear_cross_entropy(x[kept], weight, targets[kept], chunk_size=100))
    assert recorded.largest <= 8 * max(len(kept) * weight.shape[0], weight.numel(), x.numel())


def test_all_ignored_is_zero_with_zero_gradients(generator):
    """A batch without a single target has loss 0.0 and moves nothing."""
    x, weight, targets = example(generator)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, 99), ignore_index=99)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_the_loss_alone(mode, generator):
    """Where no gradient is wanted no operator of the backward runs."""
    x, weight, targets = example(generator)
    want = linear_cross_entropy(x, weight, targets, chunk_size=5)
    with mode(), Recorder() as recorded:
        loss = linear_cross_entropy(x, weight, targets, chunk_size=5)
    assert torch.equal(loss, want)
    assert not recorded.names & {"exp_", "scatter_add_", "addmm_"}


def test_frozen_weight_costs_no_product(generator):
    """With a frozen head dW is neither computed nor allocated, and dx is what it was."""
    x, weight, targets = example(generator)
    (want,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    with Recorder() as recorded:
        loss = linear_cross_entropy(x, weight.detach(), targets)
    assert "addmm_" not in recorded.names
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)


def test_improbable_targets_have_an_exact_loss():
    """A target whose probability underflows float32 still has its finite loss and gradient."""
    x = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[300.0], [-300.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 0]))
    assert loss.item() == 600.0
    assert torch.autograd.grad(loss, x)[0].tolist() == [[600.0], [0.0]]


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_bfloat16_accumulates_in_float32(compute_dtype, generator):
    """Loss and dW summed over many chunks lie within a few roundings of one bfloat16 product of the exact result."""
    x, weight, targets = example(generator, tokens=512, width=16, vocab=32, dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets, chunk_size=4, compute_dtype=compute_dtype)
    exact_weight = weight.detach().double().requires_grad_()
    exact = reference_linear_cross_entropy(x.detach().double(), exact_weight, targets)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < (2**-20 if compute_dtype else 2**-11)
    (got,), (want,) = torch.autograd.grad(loss, weight), torch.autograd.grad(exact, exact_weight)
    assert got.dtype == torch.bfloat16
    assert float((got - want).norm() / want.norm()) < 2**-8


def test_int32_targets_are_taken(generator):
    """Loaders that keep tokens in 32 bits need not widen them."""
    x, weight, targets = example(generator)
    assert torch.equal(linear_cross_entropy(x, weight, targets.int()), linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize("target", [7, -1])
def test_a_target_outside_the_vocabulary_is_named(target, generator):
    """The error gives the value and its row in the caller's own numbering."""
    x, weight, targets = example(generator)
    targets[0], targets[5] = -100, target
    message = rf"^targets must be -100 \(ignored\) or in \[0, 7\), got {target} in row 5: the tokenizer's .*$"
    with pytest.raises(DataError, match=message):
        linear_cross_entropy(x, weight, targets)


def test_a_chunk_needs_a_token(generator):
    """A chunk size of zero would never end."""
    with pytest.raises(ConfigError, match=r"^chunk_size must be at least 1 token, got 0: leave it out .*$"):
        linear_cross_entropy(*example(generator), chunk_size=0)


@pytest.mark.parametrize(("vocab", "tokens"), [(0, 8388608), (1, 8388608), (32000, 262), (128256, 128)])
def test_default_chunk_fills_a_buffer_of_bounded_size(vocab, tokens):
    """The default buffer holds at most 2^23 logits, or 128 tokens of a very large vocabulary."""
    assert default_chunk_size(vocab) == tokens


def test_default_chunk_is_that_of_the_vocabulary(generator, monkeypatch):
    """Not of the width."""
    asked = []
    monkeypatch.setattr(loss_file, "default_chunk_size", lambda vocab: asked.append(vocab) or 3)
    linear_cross_entropy(*example(generator, width=4, vocab=7))
    assert asked == [7]


def test_a_single_target_and_equal_targets_are_taken(generator):
    """The smallest target may be the largest."""
    x, weight, targets = example(generator)
    for some in (targets[:1], torch.full_like(targets, 6), torch.zeros_like(targets)):
        loss = linear_cross_entropy(x[: len(some)], weight, some)
        torch.testing.assert_close(loss, reference_linear_cross_entropy(x[: len(some)], weight, some))


def test_inputs_are_not_copied_when_every_token_has_a_target(generator):
    """Without an ignored target the operation stands on x itself."""
    x, weight, targets = example(generator)
    assert linear_cross_entropy(x, weight, targets).grad_fn.next_functions[0][0].variable is x
    targets[2] = -100
    assert not hasattr(linear_cross_entropy(x, weight, targets).grad_fn.next_functions[0][0], "variable")


def test_large_logits_do_not_overflow():
    """The shift is the largest logit: the others vanish next to it, and none is infinite."""
    loss = linear_cross_entropy(torch.tensor([[800.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([1]))
    assert loss.item() == 0.0


def test_a_frozen_head_is_widened_by_tiles(monkeypatch):
    """In another dtype than it is stored in, a few rows at a time; as it is stored, or trained, all at once."""
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).bfloat16()

    def pieces(tile: int, dtype: torch.dtype, *, is_trained: bool) -> list[slice]:
        monkeypatch.setattr(loss_file, "_TILE", tile)
        found = list(loss_file._head_tiles(weight, dtype, is_trained=is_trained)())
        assert all(torch.equal(part, weight[rows].to(dtype)) for rows, part in found)
        return [rows for rows, _ in found]

    assert pieces(12, torch.float32, is_trained=False) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert pieces(2, torch.float32, is_trained=False) == [slice(row, row + 1) for row in range(7)]
    assert pieces(12, torch.float32, is_trained=True) == [slice(None)]
    assert pieces(12, torch.bfloat16, is_trained=False) == [slice(None)]


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_head_is_cut_when_it_is_frozen(is_trained, generator, monkeypatch):
    """Loss and gradients over tiles of the head are those over the whole, and memory that nobody wrote is not read."""
    x, weight, targets = example(generator, dtype=torch.float32)
    narrow = weight.detach().bfloat16().requires_grad_(is_trained)
    wanted = [x, narrow] if is_trained else [x]
    cut, head_tiles = [], loss_file._head_tiles
    monkeypatch.setattr(loss_file, "_TILE", 12)

    def noted(*args, is_trained):
        cut.append(not is_trained)
        return head_tiles(*args, is_trained=is_trained)

    monkeypatch.setattr(loss_file, "_head_tiles", noted)
    torch.use_deterministic_algorithms(mode=True)  # fills what is allocated with NaN
    try:
        got = linear_cross_entropy(x, narrow, targets, chunk_size=5)
        grads = torch.autograd.grad(got, wanted)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    want = reference_linear_cross_entropy(x, narrow.float(), targets)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for grad, expected in zip(grads, torch.autograd.grad(want, wanted), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    assert cut == [not is_trained]


def test_products_are_made_where_they_belong():
    """In one dtype a product is written or added in place, without a second of its size."""
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)
    for product, value in ((loss_file.write_product, 3.0), (loss_file.add_product, 6.0)):
        with Recorder() as recorded:
            product(a, b, out=out)
        assert torch.equal(out, torch.full((2, 4), value))
        assert recorded.names <= {"mm", "addmm_"}


def test_gradients_are_cast_as_they_are_scaled(generator):
    """The backward makes no wide copy of dW that autograd would cast."""
    x, weight, targets = example(generator, dtype=torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets)
    with Recorder() as recorded:
        torch.autograd.grad(loss, (x, weight))
    assert "_to_copy" not in recorded.names


def test_targets_that_were_checked_are_not_looked_at_again(generator):
    """On a device each look would be a wait: the result is the same, and nothing searches the targets."""
    x, weight, targets = example(generator)
    with Recorder() as seen:
        loss = linear_cross_entropy(x, weight, targets, is_checked=True)
    assert torch.equal(loss, linear_cross_entropy(x, weight, targets))
    assert not {"nonzero", "min", "max", "_local_scalar_dense"} & seen.names

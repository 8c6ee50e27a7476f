"""What holds for every operation, whatever it computes: one table, one file of tests."""

import math

import pytest
import torch
from torch import Tensor

from entrenar import ops
from entrenar.errors import EntrenarError

from .cases import Backward, Example, table, vjp

TABLE = table()
NOT_OPERATIONS = {
    "KINDS", "QUANTIZE", "DocumentSpans", "Documents", "Int8Weight", "Nf4Weight", "NfBitsWeight", "QuantizedWeight",
    "dequantize_nf4", "dequantize_nf_bits", "document_spans", "fastest_compute_dtype", "nf_bits_size",
    "quantize_int8", "quantize_nf4", "quantize_nf_bits", "quantized_embedding", "stored_bytes",
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64, batch: int = 2, time: int = 3) -> Example:
    return TABLE[name](batch, time, dtype, torch.Generator().manual_seed(1))


def leaves(example: Example) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in example.inputs)


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def wrong_backwards() -> list[tuple[str, str]]:
    return [(name, slip) for name in TABLE for slip in build(name).wrong]


def planted(example: Example, backward: Backward) -> torch.autograd.Function:
    """Return the operation with another backward."""

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return example.op(*inputs)

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, *ctx.saved_tensors)

    return Planted


def gradcheck(function, inputs: tuple[Tensor, ...]) -> bool:
    return torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


every_op = pytest.mark.parametrize("name", TABLE)


def test_every_public_operation_has_a_row():
    """An operation that is exported but not in the table is not tested."""
    assert {name.split("/")[0] for name in TABLE} == set(ops.__all__) - NOT_OPERATIONS


@every_op
def test_gradient_is_the_derivative_of_the_forward(name, certificate):
    """Central differences in float64 agree with the backward on every input."""
    example = build(name)
    assert gradcheck(example.op, leaves(example))
    sizes = [list(x.shape) for x in example.inputs]
    certificate.add(name, "gradcheck", method="whole Jacobian, float64", case=name, sizes=sizes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "slip"), wrong_backwards())
def test_gradient_check_refuses_a_wrong_backward(name, slip, certificate):
    """Every known slip fails the check that the operation passes, so the check can tell them apart."""
    example = build(name)
    with pytest.raises(RuntimeError, match=r"Jacobian mismatch|not multiplied by grad_output"):
        gradcheck(planted(example, example.wrong[slip]).apply, leaves(example))
    certificate.add(name, "controls", proof="gradcheck", case=name, planted=slip)


@every_op
def test_gradient_check_accepts_the_right_backward_when_planted(name):
    """The negative controls fail for their arithmetic, not for the way they are planted."""
    example = build(name)
    assert gradcheck(planted(example, lambda dy, *inputs: vjp(example.reference, dy, *inputs)).apply, leaves(example))


@every_op
@pytest.mark.parametrize(("batch", "time"), [(2, 3), (1, 1), (1, 5), (3, 1)])
def test_equals_the_reference_forward_and_backward(name, batch, time):
    """The fast path and plain torch agree to float64 rounding under a random cotangent."""
    example = build(name, batch=batch, time=time)
    y = example.op(*example.inputs)
    want = example.reference(*example.inputs)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = cotangent(y)
    for got, grad in zip(
        vjp(example.op, dy, *example.inputs), vjp(example.reference, dy, *example.inputs), strict=True
    ):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


@every_op
@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0)])
def test_no_rows_give_an_empty_output_and_zero_gradients(name, batch, time, certificate):
    """A batch without rows or tokens passes through forward and backward."""
    example = build(name, batch=batch, time=time)
    y = example.op(*example.inputs)
    assert y.shape == example.reference(*example.inputs).shape
    assert y.abs().sum() == 0
    for grad, x in zip(vjp(example.op, torch.ones_like(y), *example.inputs), example.inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
    certificate.add(name, "shapes", case=name, batch=batch, time=time, empty=True)


ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@every_op
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 6), (torch.float16, 2), (torch.bfloat16, 2)])
def test_low_precision_is_bounded_relative_to_float64(name, dtype, bound, certificate):
    """Output and gradients lie within `bound` roundings of the float64 result on the same numbers, in their dtype."""
    example = build(name, dtype, batch=3, time=17)
    exact = build(name, batch=3, time=17).reference
    doubles = tuple(x.double() for x in example.inputs)
    y = example.op(*example.inputs)
    dy = cotangent(y)
    grads = vjp(example.op, dy, *example.inputs)
    assert [grad.dtype for grad in grads] == [x.dtype for x in example.inputs]
    pairs = zip((y, *grads), (exact(*doubles), *vjp(exact, dy.double(), *doubles)), strict=True)
    errors = [relative_error(got, want) for got, want in pairs]
    assert max(errors) < bound * ROUNDING[dtype]
    figures = {"roundings": max(errors) / ROUNDING[dtype], "bound": bound, "sqnr_db": -20 * math.log10(max(errors))}
    certificate.add(name, "error", against="float64", case=name, dtype=str(dtype), **figures)


@every_op
def test_frozen_inputs_get_no_gradient(name):
    """With one input frozen its gradient is None and the others are what they were."""
    example = build(name)
    y = example.op(*example.inputs)
    all_grads = vjp(example.op, cotangent(y), *example.inputs)
    for frozen in range(len(example.inputs)):
        inputs = leaves(example)
        inputs[frozen].requires_grad_(requires_grad=False)
        y = example.op(*inputs)
        assert y.requires_grad == (len(inputs) > 1)
        if y.requires_grad:
            y.backward(cotangent(y))
        for place, (x, grad) in enumerate(zip(inputs, all_grads, strict=True)):
            assert x.grad is None if place == frozen else torch.equal(x.grad, grad)


@every_op
def test_inputs_and_saved_tensors_are_left_as_they_were(name):
    """Two backwards through one graph agree bit for bit, and no input is written to."""
    example = build(name)
    inputs = leaves(example)
    y = example.op(*inputs)
    dy = cotangent(y)
    kept = dy.clone()
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.autograd.grad(y, inputs, dy), strict=True))
    assert all(torch.equal(x, was) for x, was in zip(inputs, example.inputs, strict=True))
    assert torch.equal(dy, kept)
    assert all(x._version == 0 for x in (dy, *inputs))


@every_op
def test_output_and_gradients_share_no_memory_with_the_inputs(name):
    """Writing to an output or gradient never reaches an input."""
    example = build(name)
    inputs = leaves(example)
    y = example.op(*inputs)
    dy = cotangent(y)
    results = (y, *torch.autograd.grad(y, inputs, dy))
    storages = [x.untyped_storage().data_ptr() for x in (*inputs, dy, *results)]
    assert len(set(storages)) == len(storages)


@every_op
def test_strided_inputs_and_cotangents_give_the_same_result(name):
    """A transposed, a padded and an expanded layout change nothing but the addresses."""
    example = build(name)
    y = example.op(*example.inputs)
    dy = torch.ones_like(y)
    want = vjp(example.op, dy, *example.inputs)

    def padded(x: Tensor) -> Tensor:
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]

    for layout in (padded, lambda x: x.mT.contiguous().mT):
        strided = tuple(layout(x) if x.ndim > 1 else padded(x) for x in example.inputs)
        torch.testing.assert_close(example.op(*strided), y, rtol=1e-13, atol=1e-13)
        expanded = torch.ones((), dtype=y.dtype).expand(y.shape)
        for got, grad in zip(vjp(example.op, expanded, *strided), want, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-13)


# linear in the stored dtype is torch's own operation, which has a second derivative
@pytest.mark.parametrize("name", [name for name in TABLE if name != "linear"])
def test_double_backward_is_refused(name):
    """A second derivative, which nobody derived, is an error and not a wrong number."""
    example = build(name)
    inputs = leaves(example)
    op = name.split("/")[0]
    with pytest.raises(EntrenarError, match=rf"^{op} has a first derivative only, .*: call reference_{op}, which .*$"):
        torch.autograd.grad(example.op(*inputs).sum(), inputs, create_graph=True)


@every_op
def test_reference_differentiates_twice(name):
    """The remedy that the refusal names works."""
    example = build(name)
    inputs = leaves(example)
    first = torch.autograd.grad(example.reference(*inputs).pow(2).sum(), inputs, create_graph=True)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs))

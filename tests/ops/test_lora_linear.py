"""The low-rank product is the reference's, forward and backward, and each known-wrong backward is found out."""

import pytest
import torch
from torch import Tensor

from entrenar.errors import EntrenarError
from entrenar.ops.linear import linear
from entrenar.ops.lora_linear import (
    add_branch_gradient,
    draw_kept,
    lora_linear,
    reference_lora_linear,
)

SCALE = 1.7
DROPOUT = 0.4


def operands(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    """x, weight, A and B: 5 inputs, 4 outputs, rank 2."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((*rows, 5), (4, 5), (2, 5), (4, 2))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_float64_gradcheck_with_all_inputs(dropout: float) -> None:
    """Every gradient, dW included, equals central differences of the forward for random cotangents."""
    assert torch.autograd.gradcheck(
        lambda *tensors: lora_linear(*tensors, scale=SCALE, dropout=dropout, generator=seeded()),
        operands(),
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_output_and_gradients_equal_the_reference(dropout: float) -> None:
    """Fast path and plain torch agree to float64 rounding in output and in all four gradients."""
    results = []
    for op in (lora_linear, reference_lora_linear):
        tensors = operands()
        y = op(*tensors, scale=SCALE, dropout=dropout, generator=seeded())
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        results.append([y.detach(), *(tensor.grad for tensor in tensors)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_frozen_tensors_get_no_gradient_and_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen weight and an input that needs no gradient cost nothing: the largest product of the backward is thin."""
    tensors = operands(rows=(16,))
    for frozen in tensors[:2]:
        frozen.requires_grad_(requires_grad=False)
    y = lora_linear(*tensors, scale=SCALE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y.sum().backward()
    products = [event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    assert sorted(products) == sorted([[[16, 4], [4, 2]], [[2, 16], [16, 5]], [[2, 16], [16, 4]]])
    assert tensors[0].grad is None
    assert tensors[1].grad is None


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_wanted_gradient_is_the_one_given(wanted: int) -> None:
    """Whichever single input needs a gradient, it alone gets one, and the right one."""
    everything = operands()
    lora_linear(*everything, scale=SCALE, dropout=DROPOUT, generator=seeded()).sum().backward()
    tensors = [tensor.detach().requires_grad_(place == wanted) for place, tensor in enumerate(operands())]
    lora_linear(*tensors, scale=SCALE, dropout=DROPOUT, generator=seeded()).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == wanted for place in range(4)]
    assert torch.equal(tensors[wanted].grad, everything[wanted].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_zero_b_gives_the_base_product_bitwise(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
    """With B = 0 the output is the frozen layer's, bit for bit, stored and multiplied in either precision."""
    x, weight, lora_a, lora_b = operands(dtype, rows=(2, 7))
    y = lora_linear(x, weight, lora_a, torch.zeros_like(lora_b), scale=SCALE, compute_dtype=compute_dtype)
    assert torch.equal(y, linear(x, weight, compute_dtype))
    assert y.dtype == dtype


def test_compute_dtype_bounds_the_error_of_stored_bfloat16() -> None:
    """bfloat16 operands multiplied in float32 give the float64 result rounded once: half an ulp, 2^-8 relative."""
    tensors = operands(torch.bfloat16, rows=(50,))
    y = lora_linear(*tensors, scale=SCALE, compute_dtype=torch.float32)
    exact = reference_lora_linear(*(tensor.double() for tensor in tensors), scale=SCALE)
    assert float(((y.double() - exact).abs() / exact.abs()).detach().max()) < 2**-8
    y.backward(torch.ones_like(y))
    assert [tensor.grad.dtype for tensor in tensors] == [torch.bfloat16] * 4


def test_adapter_may_be_stored_wider_than_the_base() -> None:
    """float32 adapters over a bfloat16 base get float32 gradients; the output keeps the input's dtype."""
    x, weight, lora_a, lora_b = operands(torch.bfloat16)
    lora_a, lora_b = (tensor.detach().float().requires_grad_() for tensor in (lora_a, lora_b))
    y = lora_linear(x, weight, lora_a, lora_b, scale=SCALE)
    y.sum().backward()
    assert (y.dtype, lora_a.grad.dtype, lora_b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(dropout: float) -> None:
    """The share kept is 1-p within four standard errors, neighbors are independent, and the chance is what is used."""
    size = 200_000
    kept, chance = draw_kept(torch.empty(size), dropout, seeded())
    assert abs(chance - (1 - dropout)) <= 2**-17
    error = (chance * dropout / size) ** 0.5
    assert abs(float(kept.double().mean()) - chance) < 4 * error
    both = float((kept[1:] & kept[:-1]).double().mean())
    assert abs(both - chance**2) < 8 * error


@pytest.mark.parametrize("dropout", [1e-9, 1 - 1e-9])
def test_extreme_dropout_stays_finite(dropout: float) -> None:
    """A chance too near 0 or 1 for sixteen bits neither flips the mask nor divides by zero."""
    kept, chance = draw_kept(torch.empty(10_000), dropout, seeded())
    assert 0 < chance < 1
    assert abs(float(kept.double().mean()) - (1 - dropout)) < 0.01


def test_dropout_spares_the_frozen_product() -> None:
    """Dropout acts on the adapter's branch only: with B = 0 nothing is dropped."""
    x, weight, lora_a, lora_b = operands()
    y = lora_linear(x, weight, lora_a, torch.zeros_like(lora_b), scale=SCALE, dropout=0.9, generator=seeded())
    assert torch.equal(y, linear(x, weight))


def test_dropout_is_replayed_by_activation_checkpointing() -> None:
    """Without a generator the mask comes from torch's own, so a recomputed forward draws the same one."""
    gradients = []
    for is_checkpointed in (False, True):
        tensors = operands()
        torch.manual_seed(7)

        def run(*inputs: Tensor) -> Tensor:
            return lora_linear(*inputs, scale=SCALE, dropout=DROPOUT)

        y = torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False) if is_checkpointed else run(*tensors)
        y.sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_saved_tensors_are_not_written_to() -> None:
    """Two backwards through one retained graph give the same gradients: nothing saved was overwritten."""
    tensors = operands()
    y = lora_linear(*tensors, scale=SCALE, dropout=DROPOUT, generator=seeded())
    first, second = (torch.autograd.grad(y.sum(), tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_branchs_gradient_is_added_to_a_sum_in_wider_numbers() -> None:
    """The sum in float32, the branch in bfloat16, without dropout: the product is widened, then added (eq. 4)."""
    generator = torch.Generator().manual_seed(2)
    dx, dlow, lora_a = (torch.randn(shape, generator=generator) for shape in ((3, 5), (3, 2), (2, 5)))
    expected = dx + (dlow.bfloat16() @ lora_a.bfloat16()).float()
    torch.testing.assert_close(add_branch_gradient(dx, dlow.bfloat16(), lora_a.bfloat16(), None), expected)


def test_second_derivative_is_refused() -> None:
    """create_graph=True gets an error that names the reference, not a wrong second derivative."""
    y = lora_linear(*operands(), scale=SCALE)
    with pytest.raises(EntrenarError, match=r"lora_linear has a first derivative only.*reference_lora_linear"):
        y.sum().backward(create_graph=True)

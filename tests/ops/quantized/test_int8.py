"""A weight in eight bits by row is bitsandbytes', errs by half a step at most, and is never widened whole."""

import warnings

import pytest
import torch
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops.linear_cross_entropy import linear_cross_entropy
from entrenar.ops.quantized.int8 import Int8Weight, dequantize_int8, quantize_int8
from entrenar.ops.quantized.linear import quantized_linear
from entrenar.ops.quantized.protocol import stored_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle; extra `test`")


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).exp() ** 3
    weight[2] = 0
    return weight


def test_codes_and_scales_equal_bitsandbytes():
    """Both are the oracle's to the bit, over several blocks of rows."""
    weight = draw(700, 1000)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    ours = quantize_int8(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_half_a_step_of_each_row(dtype):
    """A step is 1/127 of the row's largest number, which is exact; a row of zeros stays one."""
    weight = draw(40, 75).to(dtype)
    before = weight.clone()
    found = dequantize_int8(quantize_int8(weight))
    assert torch.equal(weight, before)
    largest = weight.float().abs().amax(1, keepdim=True)
    assert bool(((found - weight.float()).abs() <= largest * (0.5 / 127 * 1.0001)).all())
    assert not found[2].any()
    assert torch.allclose(found.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)


def test_some_rows_are_those_of_the_whole():
    """A range of rows, and a list of them in any order and repeated, read as the whole does."""
    weight = quantize_int8(draw(60, 10))
    whole = dequantize_int8(weight)
    assert torch.equal(dequantize_int8(weight, rows=slice(25, 53)), whole[25:53])
    chosen = torch.tensor([59, 0, 25, 25])
    assert torch.equal(dequantize_int8(weight, rows=chosen), whole[chosen])
    assert torch.equal(weight.dequantize(torch.bfloat16, slice(3, 9)), whole[3:9].bfloat16())


def test_a_weight_takes_a_byte_a_number_and_a_scale_a_row():
    """Nothing else is held."""
    assert stored_bytes(quantize_int8(draw(40, 75))) == 40 * 75 + 4 * 40


def test_product_and_loss_over_tiles_are_those_of_the_widened_weight():
    """Logits, loss and dx equal those over the dequantized head, which is cut into several tiles."""
    head, x = quantize_int8(draw(2000, 1024)), draw(6, 1024, seed=3).requires_grad_()
    wide, targets = head.dequantize(), torch.arange(6) * 333
    torch.testing.assert_close(quantized_linear(x, head), x @ wide.mT, rtol=1e-5, atol=1e-3)
    pairs = []
    for weight in (head, wide):
        loss = linear_cross_entropy(x, weight, targets, chunk_size=4)
        pairs.append((loss, *torch.autograd.grad(loss, x)))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(number):
    """The row is named."""
    weight = draw(9, 8)
    weight[7, 3] = number
    with pytest.raises(DataError, match=r"must be finite, got NaN or infinity in row 7 of \(9, 8\); repair"):
        quantize_int8(weight)


def test_it_lies_where_its_codes_lie():
    """The device is that of the codes."""
    weight = Int8Weight(torch.zeros(2, 3, dtype=torch.int8, device="meta"), torch.zeros(2), (2, 3))
    assert weight.device.type == "meta"


def test_codes_of_a_trained_weight_carry_no_graph():
    """What is quantized is frozen: no tensor of it has a gradient."""
    assert not any(tensor.requires_grad for tensor in quantize_int8(torch.nn.Parameter(draw(3, 70))).tensors().values())


def test_a_code_has_eight_bits():
    """What `bits` says is what a number takes in memory, without the scale of its row."""
    weight = quantize_int8(draw(40, 75))
    assert weight.bits == 8 * weight.codes.element_size() == 8

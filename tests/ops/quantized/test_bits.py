"""A weight in 2 to 8 bits reads back as the nearest levels, loses less than NF4 does, and refuses bad numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.errors import ConfigError, DataError
from entrenar.ops.linear_cross_entropy import linear_cross_entropy
from entrenar.ops.lora_linear import lora_linear
from entrenar.ops.quantized.bits import (
    BLOCK,
    GROUP,
    WIDTHS,
    NfBitsWeight,
    dequantize_nf_bits,
    nf_bits_levels,
    nf_bits_size,
    quantize_nf_bits,
)
from entrenar.ops.quantized.linear import quantized_linear, tiles
from entrenar.ops.quantized.nf4 import dequantize_nf4, quantize_nf4
from entrenar.ops.quantized.protocol import stored_bytes

every_width = pytest.mark.parametrize("bits", WIDTHS)


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_hand(weight: NfBitsWeight) -> np.ndarray:
    """Read codes bit by bit, and multiply as equation (3) says."""
    codes, scales, tops = (tensor.numpy() for tensor in weight.tensors().values())
    levels = nf_bits_levels(weight.bits).numpy()
    out = np.zeros(weight.shape, np.float64)
    for row, column in np.ndindex(*weight.shape):
        code = sum((int(codes[row, plane, column // 8]) >> column % 8 & 1) << plane for plane in range(weight.bits))
        scale = float(scales[row, column // BLOCK]) * float(tops[row // GROUP, column // BLOCK]) / 127
        out[row, column] = levels[code] * scale
    return out


@every_width
def test_dequantizing_is_what_the_bits_say(bits):
    """Codes, read one by one, times scales are what comes back, also over odd tails and groups of rows."""
    weight = quantize_nf_bits(draw(259, 75), bits)
    torch.testing.assert_close(
        dequantize_nf_bits(weight).double(), torch.from_numpy(by_hand(weight)), rtol=1e-6, atol=0
    )


CHOICES = (1.0, 0.93, 0.86, 0.79, 0.7, 1.1, -1.0, -0.9, -0.8)


def by_definition(weight: np.ndarray, bits: int, moments: np.ndarray | None, choices: tuple[float, ...]) -> np.ndarray:
    """Quantize by equation (2) and algorithm 1 of the paper in float64, and widen again."""
    levels = nf_bits_levels(bits).double().numpy()
    rest, out = weight.copy(), np.zeros_like(weight)
    upper, importance = np.eye(weight.shape[1]), np.ones(weight.shape[1])
    if moments is not None:
        damped = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
        upper = np.linalg.cholesky(np.linalg.inv(damped)).T
        importance = np.diag(upper) ** -2
    for start in range(0, weight.shape[1], 64):
        columns = np.arange(start, min(start + 64, weight.shape[1]))
        scales = np.zeros(len(weight))
        for row, block in enumerate(rest[:, columns]):
            candidates = [choice * block[np.abs(block).argmax()] for choice in choices]
            if candidates[0]:
                rounded = [levels[np.abs(block[:, None] / d - levels).argmin(1)] * d for d in candidates]
                costs = [(importance[columns] * (values - block) ** 2).sum() for values in rounded]
                scales[row] = candidates[int(np.argmin(costs))]
        for first in range(0, len(weight), 256):
            rows = slice(first, first + 256)
            top = np.abs(scales[rows]).max() or 1.0
            codes = np.round(scales[rows] / top * 127)
            scales[rows] = np.where(codes == 0, 1, codes) * top / 127
        for column in columns:
            codes = np.abs(rest[:, column, None] / scales[:, None] - levels).argmin(1)
            out[:, column] = levels[codes] * scales
            if moments is not None:
                error = (rest[:, column] - out[:, column]) / upper[column, column]
                rest[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return out


@every_width
@pytest.mark.parametrize("kind", ["plain", "draft", "moments", "large moments"])
def test_the_weight_is_that_of_the_definition(bits, kind):
    """Scales, codes and the errors that are moved on are those of the module's equations, summed up by themselves.

    Rows of very different size lie in a group, one of them zero; the inputs' sizes differ tenfold.
    """
    plain = draw(259, 75) * 0.02
    plain[7], plain[9] = plain[7] / 300, 0
    plain[2, 70] = -0.9
    moments = None
    if "moments" in kind:
        x = (draw(500, 75, 1) @ draw(75, 75, 2)) * 10 ** draw(1, 75, 3).clamp(-1, 1)
        moments = x.mT @ x
    if kind == "large moments":  # near the end of float32, over which their products with squares would go
        moments, plain = moments * 1e28, plain * 1e6
    got = dequantize_nf_bits(quantize_nf_bits(plain, bits, moments, is_draft=kind == "draft"))
    choices = CHOICES[:1] if kind == "draft" or bits >= 6 else CHOICES
    known = None if moments is None else moments.double().numpy()
    want = torch.from_numpy(by_definition(plain.double().numpy(), bits, known, choices))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_costs_the_others_nothing():
    """It has no scale of its own, which would stretch the codes of the scales of its group."""
    plain = draw(256, 64) * 0.002
    with_zeros = plain.clone()
    with_zeros[17] = 0
    others = torch.arange(256) != 17
    want, got = (dequantize_nf_bits(quantize_nf_bits(weight, 8)) for weight in (plain, with_zeros))
    assert torch.equal(got[others], want[others])
    assert not got[17].any()


def test_a_weight_of_zeros_has_scales_all_the_same():
    """Its scales are numbers too, the same in each file."""
    held = quantize_nf_bits(torch.zeros(300, 70), 3)
    assert bool((held.scales == 1).all())
    assert bool((held.tops == 1).all())


def test_codes_of_a_trained_weight_carry_no_graph():
    """What is quantized is frozen: no tensor of it has a gradient."""
    weight = quantize_nf_bits(torch.nn.Parameter(draw(3, 70)), 4)
    assert not any(tensor.requires_grad for tensor in weight.tensors().values())


@pytest.mark.parametrize("rows", [1, 256, 257, 700])
def test_sizes_count_a_top_for_each_group_of_rows(rows):
    """Also of many groups."""
    assert stored_bytes(quantize_nf_bits(draw(rows, 130), 3)) == nf_bits_size((rows, 130), 3)


@every_width
def test_each_number_gets_the_nearest_level_of_its_block(bits):
    """No other level times the block's scale is nearer, and an exact zero stays one."""
    plain = draw(40, 128)
    plain[3, 5] = 0
    weight = quantize_nf_bits(plain, bits)
    scales = weight.scales.float() * weight.tops / 127
    every = nf_bits_levels(bits) * scales.repeat_interleave(BLOCK, 1)[..., None]  # (O, I, levels)
    error = (dequantize_nf_bits(weight) - plain).abs()
    assert bool((error <= (every - plain[..., None]).abs().amin(-1) + 1e-6).all())
    assert dequantize_nf_bits(weight)[3, 5] == 0


@every_width
def test_levels_ascend_with_an_exact_zero_and_end_at_one(bits):
    """The middle level is 0, the others lie on both sides alike, and the last is 1."""
    levels = nf_bits_levels(bits)
    assert len(levels) == 2**bits
    assert bool((levels.diff() > 0).all())
    assert levels[2 ** (bits - 1) - 1] == 0
    assert levels[-1] == 1
    assert torch.equal(levels[:-1], -levels[:-1].flip(0))


def test_levels_are_the_midpoints_of_equal_shares_of_the_cube_root_of_the_density():
    """Between -1 and a level lie (i + 1/2) of 2^k - 1 equal shares of exp(-x^2 / 2 s^2)^(1/3), found by summing it."""
    x = np.linspace(-1, 1, 2_000_001)
    shares = np.cumsum(np.exp(-(x**2) / (2 * 0.34**2)) ** (1 / 3))
    shares /= shares[-1]
    wanted = np.interp((np.arange(7) + 0.5) / 7, shares, x)
    np.testing.assert_allclose(nf_bits_levels(3)[:-1].numpy(), wanted, atol=2e-6)


def test_four_bits_lose_less_than_nf4_of_the_same_size():
    """On normal weights the squared error is at least a tenth below NF4's, in as many bytes."""
    plain = draw(512, 512)
    ours, nf4 = quantize_nf_bits(plain, 4), quantize_nf4(plain)
    error = (dequantize_nf_bits(ours) - plain).square().mean()
    assert error < 0.9 * (dequantize_nf4(nf4) - plain).square().mean()
    assert stored_bytes(ours) <= stored_bytes(nf4)


@every_width
def test_a_draft_is_worse_and_no_more_than_a_quarter(bits):
    """Without the search for scales the error grows a little, so a draft ranks widths as the final one would."""
    plain = draw(128, 256)
    final, draft = (
        (dequantize_nf_bits(quantize_nf_bits(plain, bits, is_draft=is_draft)) - plain).square().mean()
        for is_draft in (False, True)
    )
    assert final <= draft * 1.0001
    assert draft < (1.4 if bits == 2 else 1.25) * final


@every_width
def test_second_moments_lower_the_error_of_the_product(bits):
    """Errors moved to later columns make x Wᵀ better than rounding to the nearest does, by a third at least."""
    generator = torch.Generator().manual_seed(1)
    plain = draw(96, 160)
    x = torch.randn(2000, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    nearest, compensated = (
        (x @ (dequantize_nf_bits(weight) - plain).mT).square().mean()
        for weight in (quantize_nf_bits(plain, bits), quantize_nf_bits(plain, bits, x.mT @ x))
    )
    assert compensated < 0.67 * nearest


def test_inputs_that_never_occur_are_no_obstacle():
    """Second moments of zero, for some inputs or for all, still give finite weights."""
    plain, moments = draw(16, 64), torch.zeros(64, 64)
    assert bool(dequantize_nf_bits(quantize_nf_bits(plain, 3, moments)).isfinite().all())
    moments[:8, :8] = torch.eye(8)
    assert bool(dequantize_nf_bits(quantize_nf_bits(plain, 3, moments)).isfinite().all())


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 40), width=st.integers(1, 150), seed=st.integers(0, 1000))
def test_sizes_are_counted_without_quantizing(bits, rows, width, seed):
    """The bytes of every shape and width are those of the tensors, and a zero weight comes back as zero."""
    weight = quantize_nf_bits(draw(rows, width, seed) * (seed % 3), bits)
    assert stored_bytes(weight) == nf_bits_size((rows, width), bits) == sum(t.nbytes for t in weight.tensors().values())
    assert bool(dequantize_nf_bits(weight).isfinite().all())
    if seed % 3 == 0:
        assert not dequantize_nf_bits(weight).any()


@every_width
def test_some_rows_are_those_of_the_whole(bits):
    """A range of rows, and a list of them in any order and repeated, read as the whole does."""
    weight = quantize_nf_bits(draw(600, 100), bits)
    whole = dequantize_nf_bits(weight)
    assert torch.equal(dequantize_nf_bits(weight, rows=slice(250, 530)), whole[250:530])
    chosen = torch.tensor([599, 0, 256, 256])
    assert torch.equal(dequantize_nf_bits(weight, rows=chosen), whole[chosen])
    assert torch.equal(dequantize_nf_bits(weight, torch.bfloat16), whole.bfloat16())


@every_width
def test_the_product_over_tiles_is_that_with_the_widened_weight(bits):
    """Output and gradients of quantized_linear are those of the plain product over the dequantized weight."""
    weight = quantize_nf_bits(draw(200, 96), bits)
    x, lora_a, lora_b = (
        draw(*shape, seed=seed).double().requires_grad_() for seed, shape in enumerate([(5, 96), (3, 96), (200, 3)])
    )
    ours = quantized_linear(x, weight, lora_a, lora_b, scale=1.5, tile_rows=64)
    expected = lora_linear(x, weight.dequantize(torch.float64), lora_a, lora_b, scale=1.5)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    dy = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    pairs = zip(*(torch.autograd.grad(y, (x, lora_a, lora_b), dy) for y in (ours, expected)), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_tiles_cover_the_rows_once_and_stay_small():
    """Tiles follow each other from the first row to the last, none of more than a megabyte's worth of numbers."""
    weight = quantize_nf_bits(draw(700, 64), 2)
    parts = list(tiles(weight, torch.float32, 300))
    assert [rows for rows, _ in parts] == [slice(0, 300), slice(300, 600), slice(600, 700)]
    assert torch.equal(torch.cat([tile for _, tile in parts]), dequantize_nf_bits(weight))
    wide = NfBitsWeight(torch.zeros(4096, 2, 128, dtype=torch.uint8), weight.scales, weight.tops, (4096, 1024))
    first = next(iter(tiles(quantize_nf_bits(torch.zeros(wide.shape), 2), torch.float32)))
    assert first[1].numel() <= 2**20


@every_width
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_of_a_quantized_head_is_that_of_the_widened_one(bits, dtype):
    """Loss and dx of linear_cross_entropy equal those over the dequantized head, chunk by chunk."""
    head = quantize_nf_bits(draw(300, 64), bits)
    targets = torch.arange(10) * 29
    targets[3] = -100
    x = draw(10, 64, seed=3).to(dtype).requires_grad_()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    pairs = []
    for weight in (head, head.dequantize(dtype)):
        loss = linear_cross_entropy(x, weight, targets, chunk_size=4)
        pairs.append((loss, *torch.autograd.grad(loss, x)))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_a_large_head_is_widened_in_tiles_whose_parts_of_dx_add_up():
    """A head of several tiles gives the loss and dx of the whole, without gradients too."""
    head = quantize_nf_bits(draw(2000, 1024), 3)
    targets, x = torch.arange(6) * 333, draw(6, 1024, seed=3).requires_grad_()
    pairs = []
    for weight in (head, head.dequantize()):
        loss = linear_cross_entropy(x, weight, targets, chunk_size=4)
        pairs.append((loss, *torch.autograd.grad(loss, x)))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, head, targets), pairs[0][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    """The message says which widths there are, and which was asked for."""
    with pytest.raises(ConfigError, match=rf"2 to 8 bits, got {bits}"):
        quantize_nf_bits(draw(4, 64), bits)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(number):
    """The message names the row."""
    plain = draw(40, 64)
    plain[17, 3] = number
    with pytest.raises(DataError, match="NaN or infinity in row 17"):
        quantize_nf_bits(plain, 3)


def test_second_moments_that_are_not_finite_are_refused():
    """An overflown calibration is named."""
    moments = torch.eye(64)
    moments[0, 0] = math.inf
    with pytest.raises(DataError, match="second moments of inputs must be finite"):
        quantize_nf_bits(draw(4, 64), 3, moments)

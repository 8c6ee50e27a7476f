"""A bfloat16 weight and its 16-bit remainder are a float32, bit for bit, and gradients are summed in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from entrenar.train.precision import GradientSums, cast_parameters, join_master, split_master


def _split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    split_master(master.clone().view(torch.int32), weight, remainder)
    return weight, remainder


def _join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    bits, scratch = (torch.empty_like(weight, dtype=torch.int32) for _ in range(2))
    return join_master(weight, remainder, bits, scratch)


@pytest.mark.property
@pytest.mark.kills(
    "train.precision",
    "master_bits.add_(_HALF_WEIGHT_STEP).bitwise_right_shift_(16)",
    "master_bits.bitwise_right_shift_(16)",
)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_every_bit_of_the_master_comes_back(patterns: list[int]) -> None:
    """Splitting and joining returns the same 32 bits, for every pattern: subnormals, infinities and NaN too."""
    master = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert torch.equal(_join(*_split(master)).view(torch.int32), master.view(torch.int32))


@pytest.mark.proof
def test_every_low_half_comes_back_at_every_exponent() -> None:
    """All 65,536 low halves with every exponent and both signs are restored: the whole carry logic."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    for exponent in range(0, 256, 5):
        for upper in (0, 0x7F):
            for sign in (0, -(2**31)):
                bits = low + (exponent << 23) + (upper << 16) + sign
                assert torch.equal(_join(*_split(bits.view(torch.float32))).view(torch.int32), bits)


def test_the_weight_is_the_nearest_bfloat16() -> None:
    """No other bfloat16 is nearer to the master: it equals torch's rounding but for exact halves."""
    master = torch.randn(100_000) * 0.02
    weight, _ = _split(master)
    nearest = master.to(torch.bfloat16)
    assert torch.equal((weight.double() - master.double()).abs(), (nearest.double() - master.double()).abs())


def test_cast_rounds_frozen_ones_and_leaves_buffers() -> None:
    """Trained parameters get a remainder; frozen ones are rounded; buffers, integers and float64 stay as they are."""
    module = nn.BatchNorm1d(4)
    module.register_parameter("wide", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    module.bias.requires_grad = False
    before = module.weight.data.fill_(1.001).clone()
    remainders = cast_parameters(module.parameters())
    assert list(remainders) == [module.weight]
    assert torch.equal(_join(module.weight.data, remainders[module.weight]), before)
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (module.running_mean.dtype, module.wide.dtype) == (torch.float32, torch.float64)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    """1 + 255 * 2^-8 stays 1 in bfloat16; the float32 sums hold it exactly, and the small gradients are freed."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sums = GradientSums([parameter])
    sums.begin(256)
    for value in [1.0] + [2.0**-9] * 255:
        (parameter * value).sum().backward()
        assert parameter.grad is None
    gradient = sums.of(parameter)
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((3,), 1 + 255 * 2.0**-9))


def test_one_backward_pass_needs_no_sums() -> None:
    """A single pass leaves the gradient in the parameter's own precision, and a former step's sums are gone."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sums = GradientSums([parameter])
    sums.begin(2)
    (parameter * 2).sum().backward()
    sums.begin(1)
    assert sums.of(parameter) is None
    (parameter * 3).sum().backward()
    assert sums.of(parameter) is parameter.grad
    assert torch.equal(parameter.grad, torch.full((3,), 3.0, dtype=torch.bfloat16))


def test_begin_forgets_the_gradients_of_the_step_before() -> None:
    """Sums start from zero at each step, in both precisions."""
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.ones(3, dtype=dtype))
        sums = GradientSums([parameter])
        for _ in range(2):
            sums.begin(2)
            for _ in range(2):
                (parameter * 2).sum().backward()
        assert torch.equal(sums.of(parameter), torch.full((3,), 4.0))

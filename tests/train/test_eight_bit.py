"""Moments in eight bits: the codes are bitsandbytes', nothing small is lost, and training goes where AdamW goes."""

import pytest
import torch
from torch import nn

from entrenar.errors import ConfigError
from entrenar.train.eight_bit import BLOCK, EightBitCoder, dynamic_map, empty_codes, nearest_codes
from entrenar.train.optim import OptimConfig, Optimizer, build_optimizer

SIZE = 4 * BLOCK


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_numbers_are_those_of_bitsandbytes(*, is_signed: bool) -> None:
    """The 256 numbers that codes stand for equal bitsandbytes' dynamic map."""
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    torch.testing.assert_close(
        dynamic_map(is_signed=is_signed), functional.create_dynamic_map(signed=is_signed), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("is_signed", [True, False])
def test_every_number_is_its_own_nearest(*, is_signed: bool) -> None:
    """The table gives each of the 256 numbers, rounded to bfloat16, its own code."""
    numbers = dynamic_map(is_signed=is_signed)
    bits = numbers.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF
    codes = nearest_codes(numbers, keeps_zero_apart=not is_signed)[bits]
    assert codes.tolist() == list(range(256))


def _coded(values: torch.Tensor, *, is_signed: bool) -> tuple[torch.Tensor, torch.Tensor, EightBitCoder]:
    coder = EightBitCoder.prepare(SIZE, torch.device("cpu"), is_signed=is_signed)
    codes, scales = empty_codes(values, is_signed=is_signed)
    coder.values[: values.numel()].copy_(values)
    coder.encode(codes, scales)
    return codes, scales, coder


def test_a_code_is_the_nearest_but_for_one_rounding(generator: torch.Generator) -> None:
    """What comes back is as near as the nearest of the 256 numbers, up to one rounding to bfloat16 on each side."""
    values = torch.randn(SIZE - 100, generator=generator) * torch.logspace(-6, 3, SIZE - 100)
    codes, scales, coder = _coded(values, is_signed=True)
    padded = torch.cat((values, torch.zeros(100))).view(-1, BLOCK)
    nearest = (padded / scales[:, None])[..., None] - dynamic_map(is_signed=True)
    best = (nearest.abs().amin(-1) * scales[:, None]).flatten()[: SIZE - 100]
    got = (coder.decode(codes, scales) - values).abs()
    assert (got <= best + values.abs() * 2**-7).all()
    assert torch.equal(scales, padded.abs().amax(1))


def test_codes_that_were_decoded_encode_to_themselves(generator: torch.Generator) -> None:
    """A step that changes nothing changes no byte."""
    codes, scales, coder = _coded(torch.randn(SIZE, generator=generator), is_signed=True)
    before = codes.clone(), scales.clone()
    coder.decode(codes, scales)
    coder.encode(codes, scales)
    assert torch.equal(codes, before[0])
    assert torch.equal(scales, before[1])


def test_a_small_square_never_becomes_zero() -> None:
    """Beside a square a million million times as large, a square stays above zero, and zero stays zero."""
    squares = torch.zeros(BLOCK)
    squares[0], squares[1] = 1.0, 1e-12
    codes, scales, coder = _coded(squares, is_signed=False)
    decoded = coder.decode(codes, scales)
    assert decoded[0] == 1.0
    assert 0 < decoded[1] < 1e-6
    assert not decoded[2:].any()


def test_zeros_are_zeros() -> None:
    """New state decodes to zeros, and zeros encode to finite scales."""
    codes, scales, coder = _coded(torch.zeros(BLOCK + 1), is_signed=True)
    assert not coder.decode(codes, scales).any()
    assert scales.isfinite().all()


def _train(optimizer_name: str, steps: int) -> tuple[float, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    config = OptimConfig.model_validate({"optimizer": optimizer_name, "lr": 3e-3})
    optimizer = build_optimizer(model.named_parameters(), config)
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(0, 64, (64,), generator=generator)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 64, (64,), generator=generator)
        noisy = torch.where(torch.rand(64, generator=generator) < 0.2, torch.randint(0, 64, (64,)), table[tokens])
        loss = nn.functional.cross_entropy(model(tokens), noisy)
        loss.backward()
        optimizer.step(config.lr, 1.0)
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, optimizer


def test_a_hundred_steps_end_where_adamw_ends() -> None:
    """After 100 steps the loss is within 1 % of that with float32 moments."""
    plain, _ = _train("adamw", 100)
    coded, _ = _train("adamw8bit", 100)
    assert abs(coded / plain - 1) < 0.01
    assert coded != plain


def test_the_state_takes_a_quarter() -> None:
    """Moments of large parameters take 2 bytes and 8 / 256 an element; small ones keep float32."""
    _, optimizer = _train("adamw8bit", 1)
    state = optimizer.state_dict()
    weight, bias = 256 * 64, 256
    mean_bytes = sum(state[f"1.weight.{part}"].nbytes for part in ("mean", "squares", "mean_scales", "squares_scales"))
    assert mean_bytes == weight * 2 + 8 * weight // BLOCK
    assert state["1.bias.mean"].dtype == torch.float32
    assert state["1.bias.mean"].numel() == bias


def test_float64_is_refused() -> None:
    """Eight bits for float64 are a mistake, said with the parameter's name."""
    config = OptimConfig(optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="optimizer adamw8bit trains bfloat16 and float32, parameter weight is"):
        build_optimizer(nn.Linear(64, 64, dtype=torch.float64).named_parameters(), config)

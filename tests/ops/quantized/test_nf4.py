"""NF4 is bitsandbytes' bit for bit, loses what its levels allow and no more, and refuses what has no magnitude."""

import importlib
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops.quantized.nf4 import (
    Nf4Weight,
    block_magnitudes,
    dequantize_nf4,
    dynamic_map,
    nf4_code_book,
    quantize_nf4,
)
from entrenar.ops.quantized.protocol import stored_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle; extra `test`")

SHAPES = [(64, 64), (128, 256), (3, 8), (5, 62), (6, 65), (1, 2), (100, 100), (1024, 768), (33, 130)]


def draw(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of very different size, with zeros and exact ties among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02 * torch.rand(shape[0], 1, generator=generator).exp() ** 3
    weight[::5] = 0
    weight[1::7] = weight[1::7].round(decimals=2)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype):
    """Codes, scale codes, nested scales and offset are the oracle's to the bit, odd tails included."""
    weight = draw(shape).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 2 == 0])
def test_dequantized_weights_equal_bitsandbytes(shape, dtype):
    """What a file means is the same to the bit on both sides, in every dtype."""
    codes, state = functional.quantize_4bit(draw(shape), blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    # the oracle transposes what has a single byte of codes
    theirs = functional.dequantize_4bit(codes, state).reshape(shape)
    assert torch.equal(dequantize_nf4(quantize_nf4(draw(shape)), dtype), theirs)


def test_ties_and_thresholds_go_where_bitsandbytes_sends_them():
    """Each number halfway between two levels, and its two neighbours in float32, get the oracle's code."""
    book = nf4_code_book()
    halfway = (book[:-1] + book[1:]) / 2
    around = torch.cat([torch.nextafter(halfway, halfway - 1), halfway, torch.nextafter(halfway, halfway + 1)])
    weight = torch.cat([around, torch.ones(1), torch.zeros(18)]).view(1, 64)
    codes, _ = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(quantize_nf4(weight).codes, codes.view(-1))


def test_each_bin_of_the_scale_map_is_bitsandbytes():
    """Scales spread over the whole map get the oracle's 8-bit codes, those between two numbers included."""
    scales = torch.linspace(-1, 1, 256 * 512) ** 3
    scales = scales[torch.randperm(len(scales), generator=torch.Generator().manual_seed(0))]
    weight = (2 + scales)[:, None].expand(-1, 64)
    _codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(quantize_nf4(weight).absmax, state.absmax)
    assert len(state.absmax.unique()) > 200


def test_code_book_and_map_are_the_published_ones(shared_data: Path):
    """The 16 levels are those of the published table, the map is bitsandbytes'."""
    table = json.loads((shared_data / "oracles" / "nf4_codebook.json").read_text())["nf4_values_index_order"]
    assert nf4_code_book().tolist() == torch.tensor(table).tolist()
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


def test_levels_are_quantiles_of_a_normal_distribution():
    """The levels follow from QLoRA's construction: quantiles between 1/2 and 0.9677083, 8 above zero and 7 below."""
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1))).sort().values
    torch.testing.assert_close(nf4_code_book().double(), levels / levels.max(), rtol=0, atol=2e-7)


@given(rows=st.integers(1, 9), width=st.integers(1, 200), seed=st.integers(0, 99), power=st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_error_is_within_half_a_gap_and_the_scale_s_own_error(rows, width, seed, power):
    """No number moves by more than half the widest gap of the levels, plus what its block's magnitude moved."""
    weight = draw((rows, width), seed) * 2.0**power
    held = quantize_nf4(weight)
    magnitudes = block_magnitudes(held, 0, len(held.absmax))
    blocks = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    exact = blocks.abs().amax(1)
    half_gap = (nf4_code_book()[1:] - nf4_code_book()[:-1]).max() / 2
    allowed = half_gap * exact + (magnitudes - exact).abs()
    errors = torch.nn.functional.pad((dequantize_nf4(held) - weight).view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    assert bool((errors.abs() <= allowed[:, None] * (1 + 1e-5)).all())
    # the map's widest gap is 0.0141 of the largest deviation in a group
    assert bool(
        ((magnitudes - exact).abs() <= 0.0072 * (exact - exact.mean()).abs().max() + 1e-6 * exact.max() + 1e-37).all()
    )


def test_rows_behind_the_first_group_of_magnitudes_are_those_of_the_whole():
    """Magnitudes are nested by 256 blocks: rows that begin in a later group, at its edge or within, read the same."""
    held = quantize_nf4(draw((600, 64)))
    whole = dequantize_nf4(held)
    for rows in (slice(255, 257), slice(256, 300), slice(300, 310), slice(300, 600), slice(513, 600)):
        assert torch.equal(dequantize_nf4(held, torch.float32, rows), whole[rows])


def test_every_byte_of_codes_is_its_two_levels():
    """Each of the 256 bytes stands for the level of its high half, then that of its low half."""
    held = Nf4Weight(torch.arange(256, dtype=torch.uint8), torch.ones(8), None, None, (8, 64))
    book = nf4_code_book()
    wanted = torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1).view(8, 64)
    assert torch.equal(dequantize_nf4(held), wanted)


@pytest.mark.parametrize("is_traced", [False, True])
def test_the_kernel_of_the_device_is_asked_for_but_while_a_compiler_traces(is_traced, monkeypatch):
    """A trial has no place in a graph."""
    module, asked = importlib.import_module("entrenar.ops.quantized.nf4"), []
    monkeypatch.setattr(module, "widening_on", lambda *request: asked.append(request) or module.widen)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_traced)
    dequantize_nf4(quantize_nf4(draw((2, 64))), torch.bfloat16)
    assert asked == ([] if is_traced else [(torch.device("cpu"), torch.bfloat16, module.widen)])


@pytest.mark.parametrize("width", [64, 22, 65])
def test_some_rows_are_those_of_the_whole(width):
    """Rows that begin or end in the middle of a block or a byte are the same numbers."""
    held = quantize_nf4(draw((40, width)))
    whole = dequantize_nf4(held)
    for rows in (slice(0, 1), slice(3, 17), slice(39, 40), slice(5, 5), slice(7, None)):
        assert torch.equal(dequantize_nf4(held, torch.float32, rows), whole[rows])


def test_sizes_are_four_bits_and_an_eighth():
    """A weight takes 4.127 bits a number."""
    held = quantize_nf4(torch.randn(1024, 1024))
    assert stored_bytes(held) == 2**20 // 2 + 2**14 + 2**6 * 4 + 4
    assert round(8 * stored_bytes(held) / 2**20, 3) == 4.127


def test_scales_that_were_quantized_once_are_read_as_they_are():
    """Magnitudes in float32 stand for themselves."""
    weight = draw((8, 64))
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    once = Nf4Weight(codes.view(-1), state.absmax, None, None, (8, 64))
    assert torch.equal(dequantize_nf4(once), functional.dequantize_4bit(codes, state))
    assert stored_bytes(once) == 8 * 32 + 8 * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    """NaN and infinity have no place among levels; the row that holds one is named."""
    weight = draw((8, 100))
    weight[5, 40] = bad
    message = "a weight to quantize must be finite, got NaN or infinity in row 5 of (8, 100); repair the weights first"
    with pytest.raises(DataError, match=re.escape(message)):
        quantize_nf4(weight)


def test_a_weight_without_numbers_stays_one():
    """No row is no code, and no magnitude that a mean could be taken of."""
    held = quantize_nf4(torch.zeros(0, 64))
    assert dequantize_nf4(held).shape == held.shape == (0, 64)
    assert (held.nested_absmax, held.offset) == (None, None)


def test_codes_of_a_trained_weight_carry_no_graph():
    """What is quantized is frozen: no tensor of it has a gradient."""
    held = quantize_nf4(torch.nn.Parameter(draw((3, 100))))
    assert not any(tensor.requires_grad for tensor in held.tensors().values())


def test_large_weights_are_quantized_in_parts_that_agree(monkeypatch):
    """A weight of more than 2^20 numbers is taken in parts of no more, and has the codes of its rows taken alone."""
    module, sizes = importlib.import_module("entrenar.ops.quantized.nf4"), []
    quantize_blocks = module._quantize_blocks
    monkeypatch.setattr(module, "_quantize_blocks", lambda x, t: sizes.append(len(x)) or quantize_blocks(x, t))
    weight = draw((700, 1536))
    whole = quantize_nf4(weight)
    assert sizes == [2**20, weight.numel() - 2**20]
    assert torch.equal(whole.codes[-100 * 768 :], quantize_nf4(weight[-100:]).codes)


def test_a_code_has_four_bits():
    """What `bits` says is what a number takes in memory, without the scale of its block."""
    weight = quantize_nf4(draw((64, 64)))
    assert weight.bits == 8 * weight.codes.numel() / math.prod(weight.shape) == 4


def test_an_empty_weight_means_zero_until_it_is_filled():
    """Its offset is a number that no file holds: zero."""
    weight = Nf4Weight.empty((8, 64), lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    assert weight.offset is not None
    assert weight.offset.item() == 0

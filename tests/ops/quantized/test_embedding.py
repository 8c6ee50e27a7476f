"""Looking rows up in a quantized weight gives the rows of the widened one, whatever holds it."""

import importlib

import pytest
import torch
from torch import Tensor

from entrenar.ops.quantized.bits import quantize_nf_bits
from entrenar.ops.quantized.embedding import quantized_embedding
from entrenar.ops.quantized.int8 import quantize_int8
from entrenar.ops.quantized.nf4 import Nf4Weight, block_magnitudes, quantize_nf4


def once(weight: Tensor) -> Nf4Weight:
    """NF4 whose scales were quantized once."""
    twice = quantize_nf4(weight)
    return Nf4Weight(twice.codes, block_magnitudes(twice, 0, len(twice.absmax)), None, None, twice.shape)


KINDS = {"nf4": quantize_nf4, "nf4 once": once, "int8": quantize_int8, "5 bits": lambda w: quantize_nf_bits(w, 5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 75, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_widened_weight(kind, width, dtype):
    """Bit for bit, in any order and repeated, where rows begin inside a block or a byte too."""
    weight = KINDS[kind](torch.randn(300, width, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[299, 0, 1], [17, 17, 150]])
    found = quantized_embedding(ids, weight, dtype)
    assert found.shape == (2, 3, width)
    assert torch.equal(found, weight.dequantize(dtype)[ids])


def test_many_ids_are_looked_up_in_parts_that_agree():
    """More numbers than are looked up at once."""
    weight = quantize_nf4(torch.randn(50, 512, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(0, 50, (1100,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(quantized_embedding(ids, weight), weight.dequantize()[ids])


@pytest.mark.parametrize(("width", "parts"), [(30, [3, 3, 1]), (100, [1] * 7), (300, [1] * 7)])
def test_a_part_is_as_many_ids_as_fit(width, parts, monkeypatch):
    """At least one, however wide a row is."""
    module, sizes = importlib.import_module("entrenar.ops.quantized.nf4"), []
    look_up = module._looked_up
    monkeypatch.setattr(module, "_LOOKED_UP_AT_ONCE", 100)
    monkeypatch.setattr(module, "_looked_up", lambda weight, ids: sizes.append(len(ids)) or look_up(weight, ids))
    quantized_embedding(torch.arange(7), quantize_nf4(torch.ones(8, width)))
    assert sizes == parts

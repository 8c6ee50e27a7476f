"""A product that is rehearsed is done once in earnest, for the buffers that the library keeps."""

import pytest
import torch

from entrenar.memory import status_bytes
from entrenar.planning import product_warmup as warmup
from entrenar.planning.product_warmup import ProductWarmup


@pytest.fixture
def done(monkeypatch):
    """Keep what is multiplied."""
    calls, product = [], torch.mm
    monkeypatch.setattr(warmup.torch, "mm", lambda a, b, *, out: (calls.append((a, b, out)), product(a, b, out=out)))
    return calls


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_each_shape_layout_and_dtype_is_done_once(done):
    """The same product again does nothing; another layout has another kernel."""
    practised = ProductWarmup()
    for _ in range(2):
        practised.run("aten::mm", [meta(3, 5), meta(5, 7)])
        practised.run("aten::addmm", [meta(7), meta(3, 5), meta(7, 5).mT])
        practised.run("aten::bmm", [meta(2, 3, 5, dtype=torch.bfloat16), meta(2, 5, 7, dtype=torch.bfloat16)])
    assert [(a.shape, b.shape, a.dtype, b.is_contiguous()) for a, b, _ in done] == [
        ((3, 5), (5, 7), torch.float32, True),
        ((3, 5), (5, 7), torch.float32, False),
        ((3, 5), (5, 7), torch.bfloat16, True),
    ]


def test_what_is_no_product_or_has_no_numbers_is_left_alone(done):
    """There is nothing to keep."""
    ProductWarmup().run("aten::add", [meta(3, 5), meta(3, 5)])
    ProductWarmup().run("aten::mm", [meta(0, 5), meta(5, 7)])
    assert not done


def test_a_large_product_is_done_in_part(done, monkeypatch):
    """Its longest sides are halved until it takes a moment."""
    monkeypatch.setattr(warmup, "_MOST_FLOPS", 2 * 16 * 8 * 4)
    ProductWarmup().run("aten::mm", [meta(64, 8), meta(8, 4)])
    assert [(a.shape, b.shape) for a, b, _ in done] == [((16, 8), (8, 4))]


def test_operands_and_result_leave_nothing_behind():
    """48 MB of zeros are read and 16 MB are written; what stays is buffers."""
    before = status_bytes("VmRSS")
    ProductWarmup().run("aten::mm", [meta(2000, 4000), meta(4000, 2000)])
    assert status_bytes("VmRSS") - before < 40e6
    assert warmup._zeros(3, 4, torch.bfloat16, by_rows=False).stride() == (1, 3)

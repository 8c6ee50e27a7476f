"""The kernel that widens NF4 is bitsandbytes' only where it gives the same bits in less time."""

import sys
import time

import pytest
import torch

from entrenar.ops.quantized import nf4_kernels
from entrenar.ops.quantized.nf4 import widen
from entrenar.ops.quantized.nf4_kernels import bitsandbytes_widening, faster_of, widening_on

CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda")


def slow(pairs, magnitudes, dtype):
    """Ours, and a wait."""
    time.sleep(0.05)
    return widen(pairs, magnitudes, dtype)


def wrong(pairs, magnitudes, dtype):
    """Quick, with one bit wrong in the last number."""
    wide = torch.zeros(2 * len(pairs), dtype=dtype)
    wide[-1] = 1e-9
    return wide


def absent(pairs, magnitudes, dtype):
    """What torch says of an operator without a kernel for the device."""
    raise NotImplementedError("Could not run 'bitsandbytes::dequantize_4bit' with arguments from the 'HPU' backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bytes", [1, 31, 32, 33, 96, 1_000_003])
def test_bitsandbytes_gives_our_bits(dtype, num_bytes):
    """The adapter hands over codes and magnitudes rightly, a block that is not full included."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    other = bitsandbytes_widening()
    pairs = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    magnitudes = torch.rand(-(-2 * num_bytes // 64), generator=torch.Generator().manual_seed(1))
    assert torch.equal(other(pairs, magnitudes, dtype), widen(pairs, magnitudes, dtype))


def test_the_faster_of_equals_is_taken():
    """Whichever is given as ours."""
    assert faster_of(slow, widen, CPU, torch.float32) is widen
    assert faster_of(widen, slow, CPU, torch.float32) is widen


@pytest.mark.parametrize("other", [wrong, absent])
def test_a_kernel_with_other_bits_or_none_is_not_taken(other):
    """However quick it is."""
    assert faster_of(slow, other, CPU, torch.float32) is slow


def test_a_cpu_takes_ours_without_a_trial(monkeypatch):
    """There nothing is imported, nor where a plan stands for one; elsewhere bitsandbytes is asked for."""
    asked = []
    monkeypatch.setattr(nf4_kernels, "bitsandbytes_widening", lambda: asked.append(1))
    widening_on.cache_clear()
    assert widening_on(CPU, torch.float32, widen) is widen
    assert widening_on(META, torch.float32, widen) is widen
    assert not asked
    assert widening_on(GPU, torch.float32, widen) is widen
    assert asked
    widening_on.cache_clear()


def test_without_bitsandbytes_there_is_no_other_kernel(monkeypatch):
    """The extra may be missing."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert bitsandbytes_widening() is None

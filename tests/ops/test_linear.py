"""The product whose precision is measured: rounded once, frozen weights left alone, the choice made by time."""

import sys

import pytest
import torch

from entrenar.ops import fastest_compute_dtype, linear
from entrenar.ops.linear import reference_linear


def test_a_wider_product_is_rounded_once(generator):
    """bfloat16 operands multiplied in float32 give the float32 product, rounded, forward and backward."""
    x, weight = (torch.randn(7, 5, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    dy = torch.randn(7, 7, generator=generator).bfloat16()
    y = linear(x, weight, torch.float32)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    wide_x, wide_weight, wide_dy = (tensor.detach().float() for tensor in (x, weight, dy))
    assert torch.equal(y, (wide_x @ wide_weight.mT).bfloat16())
    assert torch.equal(dx, (wide_dy @ wide_weight).bfloat16())
    assert torch.equal(dweight, (wide_dy.mT @ wide_x).bfloat16())
    assert torch.equal(y, reference_linear(x, weight, torch.float32))


def test_a_frozen_weight_gets_no_gradient(generator):
    """Only what wants a gradient gets one."""
    x = torch.randn(3, 4, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(2, 4, generator=generator).bfloat16()
    linear(x, weight, torch.float32).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize(("slow", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_faster_product_is_taken(monkeypatch, slow, expected):
    """With a clock that charges one dtype twice as much, the other one is taken."""
    now = {"s": 0.0}

    def product(x, weight):
        now["s"] += 2.0 if x.dtype == slow else 1.0

    module = sys.modules["entrenar.ops.linear"]  # the name in the package is the function
    monkeypatch.setattr(module, "linear_forward", product)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now["s"])
    assert fastest_compute_dtype(torch.bfloat16, torch.device("cpu")) == expected


def test_float32_is_not_measured():
    """What is stored in float32 is multiplied in float32."""
    assert fastest_compute_dtype(torch.float32, torch.device("cpu")) == torch.float32

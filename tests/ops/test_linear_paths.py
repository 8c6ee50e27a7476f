"""The linear product takes torch's own path where it can, works for nobody unasked, and chooses its dtype by time."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar.errors import EntrenarError
from entrenar.ops import fastest_compute_dtype, linear
from entrenar.ops.linear import reference_linear

linear_file = sys.modules["entrenar.ops.linear"]  # the name in the package is the function's
CPU = torch.device("cpu")
REPEATS = linear_file._PROBE_REPEATS


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def test_the_definition_multiplies_in_the_dtype_it_is_told():
    """float32 numbers multiplied in float64 give the float64 product, rounded once."""
    x, weight = draw(4, 3000), draw(5, 3000)
    assert torch.equal(reference_linear(x, weight, torch.float64), (x.double() @ weight.double().mT).float())
    assert torch.equal(reference_linear(x, weight), x @ weight.mT)


@pytest.mark.parametrize(("compute_dtype", "is_ours"), [(None, False), (torch.float32, False), (torch.float64, True)])
def test_torchs_own_product_runs_where_no_dtype_changes(compute_dtype, is_ours):
    """Our Function is on the tape only if the product is computed in another dtype than the stored one."""
    y = linear(draw(2, 3).requires_grad_(), draw(4, 3), compute_dtype)
    assert (y.grad_fn.name() == "LinearFunctionBackward") is is_ours


@pytest.mark.parametrize(("x_wanted", "weight_wanted", "saved"), [(True, False, 1), (False, True, 2), (True, True, 2)])
def test_what_is_frozen_is_neither_saved_nor_computed(x_wanted, weight_wanted, saved):
    """Without a gradient of the weight x is not kept; each wanted gradient is one product."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Products.count += function.overloadpacket.__name__ == "mm"
            return function(*args, **(kwargs or {}))

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(draw(2, 3).requires_grad_(x_wanted), draw(4, 3).requires_grad_(weight_wanted), torch.float64)
    assert len(kept) == saved
    with Products():
        y.sum().backward()
    assert Products.count == x_wanted + weight_wanted


def test_a_second_derivative_is_refused():
    """It would be wrong in silence, so it is an error."""
    x = draw(2, 3).requires_grad_()
    loss = linear(x, draw(4, 3).requires_grad_(), torch.float64).square().sum()
    with pytest.raises(EntrenarError, match=r"^linear has a first derivative only"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize(
    ("reduced", "wide", "chosen"),
    [
        ([9, 1, 5, 5], [9, 1, 1, 1], torch.bfloat16),  # the least time counts, not the greatest of the reduced
        ([9, 2, 2, 2], [9, 1, 5, 5], torch.float32),  # … nor of the wide
        ([9, 0.5, 0.5, 0.5], [9, 0.1, 0.1, 0.1], torch.float32),  # a ratio, no time
        ([9, 1.5, 1.5, 1.5], [9, 1.0, 1.0, 1.0], torch.bfloat16),  # more than the least gain is wanted
        ([0.01, 2, 2, 2], [9, 1, 1, 1], torch.float32),  # the first product prepares its kernel
        ([9, 1, 3, 3], [9, 1.5, 1.5, 1.5], torch.bfloat16),  # the second counts
    ],
)
def test_the_choice_follows_the_clock(reduced, wide, chosen, monkeypatch):
    """By a scripted clock: warm-up first, then the least time of each in turns."""
    now, taken = {"s": 0.0}, {torch.bfloat16: 0, torch.float32: 0}
    script = {torch.bfloat16: reduced, torch.float32: wide}

    def product(x, weight):
        assert x.all()
        assert weight.all()
        now["s"] += script[x.dtype][min(taken[x.dtype], 3)]
        taken[x.dtype] += 1

    monkeypatch.setattr(linear_file, "linear_forward", product)
    monkeypatch.setattr(linear_file, "_LEAST_GAIN", 1.5)  # which binary numbers hold exactly
    monkeypatch.setattr(linear_file.time, "perf_counter", lambda: now["s"])
    assert fastest_compute_dtype(torch.bfloat16, CPU) == chosen
    assert set(taken.values()) == {REPEATS + 1}


@pytest.mark.parametrize(
    ("stored", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "meta"), (torch.float64, "meta")]
)
def test_nothing_is_measured_where_nothing_is_to_choose(stored, device, monkeypatch):
    """Full precision, and other devices, multiply in what is stored, without a single product."""
    monkeypatch.setattr(linear_file, "linear_forward", lambda *_: pytest.fail("measured"))
    assert fastest_compute_dtype(stored, torch.device(device)) == stored

"""How every operation behaves beside its arithmetic: frozen inputs, threads, transforms, layouts, small steps."""

import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from entrenar import ops

from ..mutants import op_module
from .cases import Example, Operation, table, vjp
from .closed_forms import Problem, problems

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
TABLE = table()
PROBLEMS = [(op, problem) for op, group in problems().items() for problem in group]
every_op = pytest.mark.parametrize("name", TABLE)


def build(name: str, dtype: torch.dtype = torch.float64, batch: int = 2, time: int = 3) -> Example:
    return TABLE[name](batch, time, dtype, torch.Generator().manual_seed(1))


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)


@pytest.mark.parametrize(("op", "problem"), PROBLEMS, ids=[f"{op}-{p.name}" for op, p in PROBLEMS])
def test_gradient_is_the_complex_step_of_the_definition(op: str, problem: Problem, certificate):
    """The gradient along random directions is Im f(x + ih) / h to rounding: no difference is taken, so none cancels."""
    inputs = [torch.from_numpy(x).clone().requires_grad_() for x in problem.inputs]
    y = problem.op(importlib.import_module(op_module(op)))(*inputs)
    dy, step = problem.dy(), 1e-30
    for place, grad in enumerate(torch.autograd.grad(y, inputs, torch.from_numpy(dy))):
        direction = np.random.default_rng(place).standard_normal(grad.shape)
        moved = [x.astype(complex) for x in problem.inputs]
        moved[place] += 1j * step * direction
        want = float((dy * problem.forward(*moved).imag).sum() / step)
        error = abs(float((grad.numpy() * direction).sum()) - want) / np.abs(grad.numpy() * direction).sum()
        assert error < problem.rounding
        certificate.add(op, "gradcheck", method="complex step", case=problem.name, input=place, relative=error)


@every_op
def test_gradient_is_the_central_difference_along_random_directions(name, certificate):
    """Random cotangents and directions: in float64 to 1e-7; the specification's own step and dtype beside it."""
    example = build(name)
    for dtype, step, bound, method in (
        (torch.float64, 1e-6, 1e-7, "central difference"),
        (torch.float32, 1e-3, 0.2, "the specification's: float32, eps 1e-3, threshold 0.2"),
    ):
        inputs = tuple(x.to(dtype) for x in example.inputs)
        worst = 0.0
        for place in range(len(inputs)):
            errors = [directional_error(example, inputs, place, step, seed) for seed in range(3)]
            worst = max(worst, *errors)
        assert worst < bound
        certificate.add(name, "gradcheck", method=method, case=name, relative=worst, threshold=bound)


def directional_error(example: Example, inputs: tuple[Tensor, ...], place: int, step: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(inputs[place].shape, generator=generator, dtype=torch.float64).to(inputs[place])
    y = example.op(*inputs)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    ends = []
    for sign in (1, -1):
        moved = list(inputs)
        moved[place] = moved[place] + sign * step * direction
        ends.append(float((dy.double() * example.op(*moved).double()).sum()))
    got = float((vjp(example.op, dy, *inputs)[place] * direction).double().sum())
    want = (ends[0] - ends[1]) / (2 * step)
    return abs(got - want) / max(abs(want), 1.0)


def test_the_specifications_threshold_lets_wrong_backwards_pass(certificate):
    """Why it is not the gate: among the table's wrong backwards some lie within 0.2 of the right gradient."""
    passed, count = [], 0
    for name in TABLE:
        example = build(name)
        dy = cotangent(example.op(*example.inputs))
        right = vjp(example.op, dy, *example.inputs)
        for slip, backward in example.wrong.items():
            pairs = zip(backward(dy, *example.inputs), right, strict=True)
            error = max(float((a - b).norm() / b.norm()) if a.shape == b.shape else 9.0 for a, b in pairs)
            count += 1
            passed += [f"{name}: {slip}"] if error < 0.2 else []
    assert passed
    certificate.add("attention", "controls", proof="threshold 0.2", planted=f"{len(passed)} of {count} pass")


class Products(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts every operator that computes."""

    FREE = ("detach", "view", "_unsafe_view", "alias", "t", "transpose", "expand", "slice", "unsqueeze", "reshape")

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def work(example: Example, trained: set[int]) -> tuple[int, int]:
    """Return products and operators of one forward and backward with only some inputs trained."""
    inputs = [x.clone().requires_grad_(place in trained) for place, x in enumerate(example.inputs)]
    with Operators() as operators, Products() as products:
        y = example.op(*inputs)
        if trained:
            y.backward(torch.ones_like(y))
    return products.count, sum(operators.ran.values())


# Matrix products of forward and backward: with everything trained, then with each input frozen alone.
PRODUCTS = {
    "linear": (3, [2, 2]),
    "linear_cross_entropy": (6, [4, 4]),
    "lora_linear": (9, [7, 8, 8, 8]),
    "quantized_linear": (12, [8, 11, 11]),
    "rms_norm": (2, [1, 1]),
    "swiglu": (0, [0, 0]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_frozen_input_costs_nothing(name, certificate):
    """Freezing an input drops the products of its gradient, and fewer operators run."""
    example = build(name)
    everything = set(range(len(example.inputs)))
    products, operators = work(example, everything)
    frozen = [work(example, everything - {place}) for place in sorted(everything)]
    assert (products, [count for count, _ in frozen]) == PRODUCTS[name]
    assert all(count < operators for _, count in frozen)
    certificate.add(name, "behavior", frozen_input="costs nothing", products=products, when_frozen=PRODUCTS[name][1])


@every_op
def test_nothing_trained_is_no_backward(name):
    """With all inputs frozen the output carries no graph, and fewer operators run."""
    example = build(name)
    assert example.op(*example.inputs).grad_fn is None
    assert work(example, set())[1] < work(example, set(range(len(example.inputs))))[1]


# Large enough for torch to cut the work in two.
SIZES = {
    "attention": (4, 128),
    "attention/packed": (2, 96),
    "linear_cross_entropy": (4, 40),
    "quantized_linear": (8, 256),
}
# Gradients that are sums over tokens by a matrix product: how it cuts the sum depends on the number of its threads.
SUMS_OVER_TOKENS = {"linear": {1}, "linear_cross_entropy": {1}, "lora_linear": {1, 2, 3}, "quantized_linear": {1, 2},
                    "rms_norm": {1}}  # fmt: skip


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_but_in_sums_over_tokens(name, dtype, certificate):
    """Two runs give the same bits; one thread and two as well, but for sums over tokens, which differ by rounding."""
    batch, time = SIZES.get(name, (8, 2048))
    example = build(name, dtype, batch, time)
    dy = cotangent(example.op(*example.inputs))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            results.append((example.op(*example.inputs), *vjp(example.op, dy, *example.inputs)))
        finally:
            torch.set_num_threads(1)
    one, two, again = results
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    differing = [place for place, (a, b) in enumerate(zip(one, two, strict=True), start=-1) if not torch.equal(a, b)]
    assert set(differing) <= SUMS_OVER_TOKENS.get(name, set())  # the output is place -1
    for place in differing:
        a, b = one[place + 1].double(), two[place + 1].double()
        assert (a - b).norm() <= (batch * time) ** 0.5 * ROUNDING[dtype] * a.norm()
    certificate.add(name, "behavior", threads="1 and 2", case=name, dtype=str(dtype), differing=differing)


@every_op
def test_checkpointing_changes_no_bit(name, certificate):
    """Recomputed in the backward, output and gradients are bit for bit what they are when kept."""
    example = build(name)
    dy = cotangent(example.op(*example.inputs))

    def recomputed(*inputs: Tensor) -> Tensor:
        y = checkpoint(example.op, *inputs, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    pairs = zip(vjp(recomputed, dy, *example.inputs), vjp(example.op, dy, *example.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(recomputed(*example.inputs), example.op(*example.inputs))
    certificate.add(name, "behavior", checkpointed="same bits", case=name)


@every_op
def test_vmap_is_right_or_refused(name, certificate):
    """Mapped over a stack of inputs an operation gives each its result, or says that it cannot."""
    example = build(name)
    stacked = tuple(torch.stack((x, x / 2)) for x in example.inputs)
    try:
        y = torch.func.vmap(example.op, randomness="same")(*stacked)
    except RuntimeError as error:
        assert "setup_context" in str(error) or "vmap" in str(error)  # noqa: PT017 - either outcome is right
        certificate.add(name, "behavior", vmap="refused", case=name)
        return
    torch.testing.assert_close(y[1], example.op(*(x / 2 for x in example.inputs)), rtol=1e-13, atol=1e-13)
    certificate.add(name, "behavior", vmap="right", case=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")  # the compiler's own, about what it skips
@every_op
def test_compiled_changes_no_bit(name, certificate):
    """Traced by torch.compile, forward and backward are bit for bit the eager ones (no code is generated)."""
    example = build(name)
    dy = cotangent(example.op(*example.inputs))
    compiled = torch.compile(example.op, backend="aot_eager")
    assert torch.equal(compiled(*example.inputs), example.op(*example.inputs))
    pairs = zip(vjp(compiled, dy, *example.inputs), vjp(example.op, dy, *example.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    certificate.add(name, "behavior", compiled="same bits (aot_eager)", case=name)


def rowwise() -> dict[str, tuple[int, Operation]]:
    """Return the operations that take any leading shape, with the width of a row and everything else bound."""
    generator = torch.Generator().manual_seed(4)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5,), (4, 5), (2, 5), (4, 2))
    ]
    norm, weight, a, b = tensors
    quantized = ops.quantize_nf4(torch.randn(3, 5, generator=generator))
    return {
        "linear": (5, lambda x: ops.linear(x, weight)),
        "lora_linear": (5, lambda x: ops.lora_linear(x, weight, a, b, scale=1.5)),
        "quantized_linear": (5, lambda x: ops.quantized_linear(x, quantized)),
        "rms_norm": (5, lambda x: ops.rms_norm(x, norm, 1e-3)),
        "swiglu": (6, lambda x: ops.swiglu(x[..., :3], x[..., 3:])),
    }


@pytest.mark.parametrize("name", rowwise())
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 1, 3), (1, 5, 1, 2)])
def test_any_leading_shape_is_rows(name, lead):
    """A row alone, odd counts and many dimensions give what the same rows give as a matrix, forward and backward."""
    width, op = rowwise()[name]
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = op(x)
    flat = op(x.reshape(-1, width))
    assert y.shape == (*lead, flat.shape[-1])
    torch.testing.assert_close(y.reshape(flat.shape), flat, rtol=1e-14, atol=1e-15)
    dy = cotangent(y)
    (got,), (want,) = vjp(op, dy, x), vjp(op, dy.reshape(flat.shape), x.reshape(-1, width))
    assert got.shape == x.shape
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 3])
def test_rope_broadcasts_its_tables(rows):
    """One table for all rows is that table given once for each, to the bit."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, 2, 5, 4, generator=generator)
    angles = torch.randn(1, 5, 2, generator=generator).expand(rows, 5, 2)
    assert torch.equal(ops.rope(x, angles.cos(), angles.sin()), ops.rope(x, angles[:1].cos(), angles[:1].sin()))

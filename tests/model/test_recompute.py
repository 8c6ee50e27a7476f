"""What is recomputed is what was computed, random numbers included, and the tape holds the input alone."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from entrenar.model.recompute import recomputed

WIDTH = 8


def _piece() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, WIDTH), nn.Tanh())


def _gradients(run: Callable[[nn.Module, Tensor], Tensor], *, needs_x: bool, passes: int = 1) -> list[Tensor]:
    piece, x = _piece(), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_(needs_x)
    torch.manual_seed(3)
    loss = run(piece, x).square().sum()
    after = torch.rand(1)
    for number in range(passes):
        loss.backward(retain_graph=number < passes - 1)
    grads = [parameter.grad for parameter in piece.parameters()] + ([x.grad] if needs_x else [])
    return [*grads, after, torch.rand(1)]


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_and_random_numbers_are_the_same(*, needs_x: bool, passes: int) -> None:
    """With and without recomputing: equal gradients bit for bit, and the generator goes on as if nothing had been."""
    expected = _gradients(lambda piece, x: piece(x), needs_x=needs_x, passes=passes)
    actual = _gradients(recomputed, needs_x=needs_x, passes=passes)
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)


def test_hooks_around_it_see_the_input_alone() -> None:
    """Who watches the tape sees one tensor: the input, which can be taken away and brought back."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        seen.append(tensor.clone())
        return len(seen) - 1

    piece, x = _piece(), torch.randn(4, WIDTH)
    with saved_tensors_hooks(pack, lambda number: seen[number]):
        out = recomputed(piece, x)
    assert len(seen) == 1
    assert torch.equal(seen[0], x)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in piece.parameters())


def test_the_second_run_ends_where_nothing_more_is_saved() -> None:
    """What follows the last saved tensor is not computed again."""
    runs: list[str] = []

    def piece(x: Tensor) -> Tensor:
        runs.append("saved")
        y = x.tanh()
        z = y + 1
        runs.append("after")
        return z

    recomputed(piece, torch.randn(3, requires_grad=True)).sum().backward()
    assert runs == ["saved", "after", "saved"]


def test_the_compiler_is_not_loaded() -> None:
    """Recomputing in training loads neither torch's compiler nor its symbolic algebra."""
    script = (
        "import sys, torch\nfrom entrenar.model.recompute import recomputed\n"
        "recomputed(torch.tanh, torch.ones(3, requires_grad=True)).sum().backward()\n"
        "print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"

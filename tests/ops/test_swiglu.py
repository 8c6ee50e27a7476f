"""The gated activation: identities of silu, extremes, what is kept."""

import torch

from entrenar.ops import swiglu


def test_silu_of_a_number_and_its_negative_differ_by_the_number(generator):
    """silu(x) - silu(-x) = x, which holds for no other gate in use."""
    x = torch.randn(4, 9, generator=generator, dtype=torch.float64) * 4
    one = torch.ones_like(x)
    torch.testing.assert_close(swiglu(x, one) - swiglu(-x, one), x, rtol=1e-14, atol=1e-15)


def test_linear_in_up(generator):
    """Twice the up gives twice the output, to the bit."""
    gate, up = torch.randn(2, 3, 9, generator=generator)
    assert torch.equal(swiglu(gate, 2 * up), 2 * swiglu(gate, up))


def test_gradients_at_extreme_gates_are_their_limits():
    """Far to the right silu is the identity, far to the left it is zero; nothing overflows on the way."""
    gate = torch.tensor([[200.0, -200.0, 1e30, -1e30]], requires_grad=True)
    up = torch.full((1, 4), 3.0, requires_grad=True)
    y = swiglu(gate, up)
    dgate, dup = torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    assert dgate.tolist() == [[3.0, 0.0, 3.0, 0.0]]
    torch.testing.assert_close(dup, torch.tensor([[200.0, 0.0, 1e30, 0.0]]), rtol=1e-7, atol=1e-30)


def test_backward_saves_gate_and_up_alone(generator):
    """No activation is kept: torch's own silu times up would keep a third tensor."""
    gate, up = torch.randn(2, 3, 9, generator=generator)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate.requires_grad_(), up.requires_grad_())
    assert [x.data_ptr() for x in saved] == [gate.data_ptr(), up.data_ptr()]

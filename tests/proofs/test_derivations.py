"""Each written backward is the Jacobian-transpose product of its forward: shown by algebra on the product's source.

`symbolic.py` says how. Where an operation's own `autograd.Function` is written in formulas it is run as it stands,
blocks, buffers and all; where it calls a fused kernel, the kernel is taken at its word, and `tests/ops` sets kernel and
formula equal numerically. Every proof has broken twins that yield a
counter-example.
"""

import numpy as np
import pytest
import sympy as sp

from . import formulas
from .derivation import Derivation, derive
from .formulas import Build, symbolic_module
from .symbolic import Symbols, is_zero

pytestmark = pytest.mark.proof

PROOFS: dict[str, tuple[str, Build]] = {
    "B1 H1/1 T2 K2": ("attention", formulas.attention(1, 1, 1, 2, 2, 2, 128)),
    "B1 H1/1 T2 K2, cache of 1": ("attention", formulas.attention(1, 1, 1, 2, 3, 2, 128)),
    "B1 H2/1 T2 K2, blocks of 1": ("attention", formulas.attention(1, 2, 1, 2, 2, 2, 1)),
    "B1 H1/1 T3 K2, blocks of 2": ("attention", formulas.attention(1, 1, 1, 3, 3, 2, 2)),
    "B1 H1/1 T4 K2": ("attention", formulas.attention(1, 1, 1, 4, 4, 2, 128)),
    "B2 H4/2 T2 K2": ("attention", formulas.attention(2, 4, 2, 2, 2, 2, 128)),
    "packed 001|011 H2/1 K1": ("attention", formulas.packed_attention([[0, 0, 1], [0, 1, 1]], 2, 1, 1)),
    "packed 0012 H1/1 K2": ("attention", formulas.packed_attention([[0, 0, 1, 2]], 1, 1, 2)),
    "N2 D2": ("rms_norm", formulas.rms_norm(2, 2)),
    "N3 D4": ("rms_norm", formulas.rms_norm(3, 4)),
    "B2 H2 T2 K4": ("rope", formulas.rope(2, 2, 2, 2)),
    "B1 H1 T3 K6": ("rope", formulas.rope(1, 1, 3, 3)),
    "N2 F2": ("swiglu", formulas.swiglu(2, 2)),
    "N2 F3": ("swiglu", formulas.swiglu(2, 3)),
    "N2 I3 O2": ("linear", formulas.linear(2, 3, 2)),
    "N2 I3 O2 R1, dropout": ("lora_linear", formulas.lora_linear(2, 3, 2, 1)),
    "N2 I4 O3 R2, dropout": ("lora_linear", formulas.lora_linear(2, 4, 3, 2)),
    "N2 I4 O3 R2": ("lora_linear", formulas.lora_linear(2, 4, 3, 2, drops=False)),
    "N2 I3 O3 R1, tiles of 2, dropout": ("quantized_linear", formulas.quantized_linear(2, 3, 3, 1, 2)),
    "N2 I2 O4 R2, tiles of 3": ("quantized_linear", formulas.quantized_linear(2, 2, 4, 2, 3, drops=False)),
    "N2 D2 V3": ("linear_cross_entropy", formulas.linear_cross_entropy([0, 2], 2, 3, chunk=2)),
    "N3 D2 V4, chunks of 2": ("linear_cross_entropy", formulas.linear_cross_entropy([3, 0, 1], 2, 4, chunk=2)),
}
# A text of the operation's source, what stands there instead, and the sizes at which that is refuted.
TWINS: dict[str, tuple[str, str, str]] = {
    "attention: scale missing in dq": ("B1 H1/1 T2 K2", "dq = dscores @ k * scale", "dq = dscores @ k"),
    "attention: scale missing in dk": ("B1 H1/1 T2 K2", "dk = dscores.mT @ q * scale", "dk = dscores.mT @ q"),
    "attention: transpose missing in dk": ("B1 H1/1 T2 K2", "dk = dscores.mT @ q", "dk = dscores @ q"),
    "attention: transpose missing in dv": (
        "B1 H1/1 T2 K2", "dv = probabilities.mT @ dout", "dv = probabilities @ dout"),
    "attention: sign of the centering": (
        "B1 H1/1 T2 K2", "(dprobabilities - (dout * out)", "(dprobabilities + (dout * out)"),
    "attention: softmax not centered": (
        "B1 H1/1 T2 K2", "(dprobabilities - (dout * out).sum(-1, keepdim=True))", "dprobabilities"),
    "attention: mask of the backward missing": (
        "B1 H1/1 T2 K2",
        "scores = (q @ k.mT * scale).masked_fill(hidden, -math.inf)  # (1)\n    probabilities",
        "scores = q @ k.mT * scale  # (1)\n    probabilities"),
    "attention: mask off by one": (
        "B1 H1/1 T2 K2", ".tril(num_keys - num_queries)", ".tril(num_keys - num_queries + 1)"),
    "attention: mask aligned at the first key": (
        "B1 H1/1 T2 K2, cache of 1", ".tril(num_keys - num_queries)", ".tril(0)"),
    "attention: log-sum-exp without its shift": ("B1 H1/1 T2 K2", "torch.log(total) + shift", "torch.log(total)"),
    "attention: dv of the last block alone": (
        "B1 H2/1 T2 K2, blocks of 1", "dv[:, :, :seen] += block_dv", "dv[:, :, :seen] = block_dv"),
    "attention: documents not cut apart": (
        "packed 0012 H1/1 K2",
        "pieces = span_slices(q.shape[0], q.shape[2], spans,", "pieces = span_slices(q.shape[0], q.shape[2], (),"),
    "attention: a document begins a token early": (
        "packed 001|011 H2/1 K1", "slice(None), slice(start, end))", "slice(None), slice(max(0, start - 1), end))"),
    "rms_norm: 1/D missing": ("N2 D2", "rstd * rstd * rstd / x.shape[-1]", "rstd * rstd * rstd"),
    "rms_norm: square for the cube": ("N2 D2", "rstd * rstd * rstd / x.shape[-1]", "rstd * rstd / x.shape[-1]"),
    "rms_norm: dweight without the deviation": ("N2 D2", "rstd.mT @ (dy * x)", "(rstd / rstd).mT @ (dy * x)"),
    "rms_norm: root mean square constant": ("N2 D2", "dy * weight * rstd - x * (", "dy * weight * rstd - 0 * x * ("),
    "rms_norm: eps outside the root": ("N2 D2", "keepdim=True) + eps)  # (1)", "keepdim=True)) + eps  # (1)"),
    "rope: sine not negated": ("B2 H2 T2 K4", "cos, -sin)  # (3), (4)", "cos, sin)  # (3), (4)"),
    "rope: halves swapped": (
        "B2 H2 T2 K4", "block[..., :half], block[..., half:]", "block[..., half:], block[..., :half]"),
    "swiglu: derivative at another gate": (
        "N2 F2", "grad_input(dgate, gate, grad_input=dgate)", "grad_input(dgate, up, grad_input=dgate)"),
    "swiglu: up missing": ("N2 F2", "dgate = dy * up", "dgate = dy * 1"),
    "swiglu: dup without silu": ("N2 F3", "dup = silu(gate).mul_(dy)", "dup = gate.mul_(dy)"),
    "linear: transpose missing": (
        "N2 I3 O2", "return dy.mT @ x", "return (x.mT @ dy).reshape(dy.shape[-1], x.shape[-1])"),
    "lora_linear: scale missing in dB": ("N2 I3 O2 R1, dropout", "(low.mT @ dy).mul_(scale).mT", "(low.mT @ dy).mT"),
    "lora_linear: scale missing in du": (
        "N2 I3 O2 R1, dropout", "(dy @ lora_b).mul_(scale)", "(dy @ lora_b)"),
    "lora_linear: mask missing in dx": (
        "N2 I3 O2 R1, dropout", "dx.addcmul_(product, kept.to(dx.dtype))", "dx.add_(product)"),
    "lora_linear: mask missing in dA": (
        "N2 I3 O2 R1, dropout", "dlow.mT @ (x if kept is None else x * kept)", "dlow.mT @ x"),
    "lora_linear: mask on the frozen product": (
        "N2 I3 O2 R1, dropout", "linear_backward_weight(dy, rows)", "linear_backward_weight(dy, rows * kept)"),
    "quantized_linear: mask missing in dx": (
        "N2 I3 O3 R1, tiles of 2, dropout", "lora_a.to(wide), kept)\n ", "lora_a.to(wide), None)\n "),
    "quantized_linear: mask missing in dA": (
        "N2 I3 O3 R1, tiles of 2, dropout", "lora_a_gradient(dlow, rows, kept)", "lora_a_gradient(dlow, rows, None)"),
    "quantized_linear: scale missing in dB": (
        "N2 I3 O3 R1, tiles of 2, dropout", "lora_b_gradient(dy, low, plan.scale)", "lora_b_gradient(dy, low, 1)"),
    "quantized_linear: first columns for every tile": (
        "N2 I2 O4 R2, tiles of 3", "dx.addmm_(dy[:, columns], tile)", "dx.addmm_(dy[:, : tile.shape[0]], tile)"),
    "quantized_linear: last tile missing": (
        "N2 I2 O4 R2, tiles of 3",
        "range(0, num_rows, size)", "range(0, size, size)"),
    "linear_cross_entropy: one-hot not subtracted": (
        "N2 D2 V3", "places.new_full(places.shape, -1", "places.new_full(places.shape, 0"),
    "linear_cross_entropy: upstream gradient ignored": (
        "N3 D2 V4, chunks of 2", "scaled[block] = grad[block] * scale", "scaled[block] = grad[block]"),
    "linear_cross_entropy: dW of the last chunk alone": (
        "N3 D2 V4, chunks of 2", "return out.addmm_(a, b) if", "return torch.mm(a, b, out=out) if"),
    "linear_cross_entropy: target off by one": (
        "N3 D2 V4, chunks of 2", "places.new_full(places.shape, -1", "places.new_full(places.shape, 1"),
}  # fmt: skip


def outcome(sizes: str, *changes: tuple[str, str]) -> Derivation:
    op, build = PROOFS[sizes]
    symbols = Symbols()
    return derive(symbols, build(symbolic_module(op, symbols, *changes), symbols))


@pytest.mark.parametrize("sizes", PROOFS)
def test_the_backward_is_the_derivative_for_all_real_inputs(sizes, certificate):
    """Every partial derivative is an identity of rational functions, and the output is its definition's."""
    proof = outcome(sizes)
    assert proof.refuted is None
    assert proof.partials > 0
    figures = {"partials": proof.partials, "shifts": proof.shifts, "seconds": round(proof.seconds, 2)}
    certificate.add(PROOFS[sizes][0], "derivation", sizes=sizes, **figures)


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_yields_a_counter_example(twin, certificate):
    """With an error planted in the source the same proof finds numbers at which the derivative is missed."""
    sizes, old, new = TWINS[twin]
    refuted = outcome(sizes, (old, new)).refuted
    assert refuted is not None
    assert abs(refuted.difference) > 1e-9
    assert refuted.numbers
    certificate.add(PROOFS[sizes][0], "controls", proof="derivation", planted=twin.split(": ")[1])


@pytest.mark.parametrize("op", sorted({op for op, _ in PROOFS.values()}))
def test_every_proved_operation_has_a_twin(op):
    """A proof that nothing refutes may prove nothing."""
    assert any(twin.startswith(f"{op}: ") for twin in TWINS)


def test_a_forward_and_its_backward_wrong_together_are_refuted():
    """The derivative of another function is right for that function; the definition tells that it is another."""
    forward = ("return silu(gate).mul_(up)", "return silu(gate).mul_(up) * 2")
    backward = ("return dgate, dup", "return dgate * 2, dup * 2")
    refuted = outcome("N2 F2", forward, backward).refuted
    assert refuted is not None
    assert refuted.partial == "output 0"


def test_the_stand_in_knows_its_functions():
    """The exp of a sum with a logarithm, log of a shifted sum, and the chain rule are right at random numbers."""
    symbols = Symbols()
    x, y = sp.symbols("x y")
    total = symbols.exp(x) + symbols.exp(y)
    assert is_zero(symbols.exp(x - symbols.log(total)) - symbols.exp(x) / total)
    shift = symbols.shift()
    shifted = symbols.exp(x - shift) + symbols.exp(y - shift)
    assert is_zero(symbols.log(shifted) + shift - symbols.log(total))
    slope = symbols.gradient(symbols.log(total), [x])[0]
    at = {x: sp.Rational(1, 3), y: sp.Rational(-2, 5)}
    assert float(symbols.value(slope, dict(at))) == pytest.approx(1 / (1 + np.exp(-1 / 3 - 2 / 5)), rel=1e-12)


def test_unwritten_memory_is_noticed():
    """An output that was allocated and not filled is no formula of the inputs."""
    sizes = "B1 H2/1 T2 K2, blocks of 1"
    refuted = outcome(sizes, ("out[:, :, block] = ungroup_heads(block_out, q.shape[1])", "pass")).refuted
    assert refuted is not None
    assert any(name.startswith("unwritten") for name in refuted.numbers)

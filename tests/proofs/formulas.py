"""Each operation's forward and backward on symbols, and its forward as written down from its definition.

A builder takes a copy of the operation's module whose `torch` is symbolic, and returns the inputs, the output, the
backward, and the output by definition, written here a second time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import sympy as sp
import torch

from entrenar.ops import document_spans

from ..mutants import mutant, op_module
from .symbolic import EPS, SCALE, Sym, Symbols, constants, torch_of, variables


class Tape:
    """What `torch.autograd.Function` gives a forward and a backward; every gradient is wanted."""

    needs_input_grad = (True,) * 8
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


@dataclass(frozen=True)
class Formula:
    """A forward that has run, and the backward that belongs to it."""

    inputs: Sequence[Sym]
    y: Sym
    backward: Callable[[Sym], Sequence[Sym]]
    definition: Sym


Build = Callable[[ModuleType, Symbols], Formula]


def symbolic_module(op: str, symbols: Symbols, *changes: tuple[str, str]) -> ModuleType:
    """Return a copy of an operation's module that computes formulas; `changes` plant errors."""
    module = mutant(op_module(op), *changes)
    torch = torch_of(symbols)
    module.torch = torch
    module.Tensor = Sym
    module.refuse_double_backward = lambda _: None
    module.silu = lambda x: x * torch.sigmoid(x)
    module.linear = lambda x, weight: x @ weight.mT
    return module


def taped(function: Any, *arguments: Any) -> tuple[Sym, Callable[[Sym], Sequence[Sym]]]:
    """Run an `autograd.Function`; return its output and its backward."""
    tape = Tape()
    y = function.forward(tape, *arguments)
    return y, lambda dy: [gradient for gradient in function.backward(tape, dy) if gradient is not None]


def attended(symbols: Symbols, q: Sym, k: Sym, v: Sym, sees: Callable[[int, int, int], bool]) -> Sym:
    """Return attention by its definition, entry by entry; `sees(row, query, key)` is the mask."""
    repeats, out = q.shape[1] // k.shape[1], np.empty(q.shape, dtype=object)
    for b, h, i in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(k.shape[2]) if sees(b, i, j)]
        scores = {j: q.array[b, h, i] @ k.array[b, h // repeats, j] * SCALE for j in seen}
        weights = {j: symbols.exp(sp.expand(score)) for j, score in scores.items()}
        out[b, h, i] = sum(weights[j] * v.array[b, h // repeats, j] for j in seen) / sum(weights.values())
    return Sym(out, symbols)


def heads(symbols: Symbols, batch: int, queries: int, groups: int, time: int, keys: int, width: int) -> list[Sym]:
    shapes = {"q": (queries, time), "k": (groups, keys), "v": (groups, keys)}
    return [variables(symbols, name, batch, h, t, width) for name, (h, t) in shapes.items()]


def attention(batch: int, queries: int, groups: int, time: int, keys: int, width: int, block: int) -> Build:
    """Equations (1) to (9) on the tape, a block of queries at a time."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        inputs = heads(symbols, batch, queries, groups, time, keys, width)
        y, backward = taped(module.AttentionFunction, *inputs, SCALE, block)
        return Formula(inputs, y, backward, attended(symbols, *inputs, lambda _, i, j: j <= i + keys - time))

    return build


def packed_attention(rows: Sequence[Sequence[int]], queries: int, groups: int, width: int) -> Build:
    """The path of packed documents; the fused kernel inside it is taken at its word, which is equations (1) to (9)."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        def kernel(q: Sym, k: Sym, v: Sym, **options: Any) -> tuple[Sym, Any]:
            assert options == {"is_causal": True, "scale": SCALE}
            return taped(module.AttentionFunction, q, k, v, SCALE, 128)

        def kernel_backward(dy: Sym, *saved: Any, **options: Any) -> Sequence[Sym]:
            assert options == {"is_causal": True, "scale": SCALE}
            return saved[4](dy)

        module.torch.ops = type("ops", (), {"aten": type("aten", (), {
            "_scaled_dot_product_flash_attention_for_cpu": staticmethod(kernel),
            "_scaled_dot_product_flash_attention_for_cpu_backward": staticmethod(kernel_backward),
        })})  # fmt: skip
        spans = document_spans(torch.tensor(rows))
        inputs = heads(symbols, len(rows), queries, groups, len(rows[0]), len(rows[0]), width)
        y, backward = taped(module.FlashFunction, *inputs, SCALE, spans, "exact")
        definition = attended(symbols, *inputs, lambda b, i, j: j <= i and rows[b][i] == rows[b][j])
        return Formula(inputs, y, backward, definition)

    return build


def rms_norm(rows: int, width: int) -> Build:
    def build(module: ModuleType, symbols: Symbols) -> Formula:
        x, weight = variables(symbols, "x", rows, width), variables(symbols, "w", width)
        y, backward = taped(module.RMSNormFunction, x, weight, EPS)
        definition = np.empty(x.shape, dtype=object)
        for row, column in np.ndindex(*x.shape):
            mean = sum(entry**2 for entry in x.array[row]) / width
            definition[row, column] = (
                x.array[row, column] * weight.array[column] * symbols.function("rsqrt", mean + EPS)
            )
        return Formula([x, weight], y, backward, Sym(definition, symbols))

    return build


def rope(batch: int, queries: int, time: int, half: int) -> Build:
    """For arbitrary cos and sin: that the tables are cosines is not needed. Each plane is a complex number."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        x = variables(symbols, "x", batch, queries, time, 2 * half)
        cos, sin = (variables(symbols, name, 1, time, half) for name in ("cos", "sin"))
        y, backward = taped(module.RopeFunction, x, cos, sin)
        planes = x.array[..., :half] + sp.I * x.array[..., half:]
        turned = planes * (cos.array + sp.I * sin.array)[:, None]
        expanded = np.frompyfunc(sp.expand, 1, 1)(turned)
        real = np.frompyfunc(lambda e: e.subs(sp.I, 0), 1, 1)(expanded)
        imaginary = np.frompyfunc(lambda e: sp.expand(e.coeff(sp.I)), 1, 1)(expanded)
        return Formula([x], y, backward, Sym(np.concatenate((real, imaginary), axis=-1), symbols))

    return build


def swiglu(rows: int, width: int) -> Build:
    """Torch's silu kernels are taken at their word; `tests/ops` holds them to the closed form."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        def silu_backward(dy: Sym, gate: Sym, *, grad_input: Sym) -> Sym:
            sigma = module.torch.sigmoid(gate)
            return grad_input.copy_(dy * (sigma + gate * sigma * (1 - sigma)))

        kernel = type("silu_backward", (), {"grad_input": staticmethod(silu_backward)})
        module.torch.ops = type("ops", (), {"aten": type("aten", (), {"silu_backward": kernel})})
        gate, up = variables(symbols, "gate", rows, width), variables(symbols, "up", rows, width)
        y, backward = taped(module.SwiGLUFunction, gate, up)
        logistic = np.frompyfunc(lambda entry: symbols.function("sigmoid", entry), 1, 1)(gate.array)
        return Formula([gate, up], y, backward, Sym(gate.array * logistic * up.array, symbols))

    return build


def linear(rows: int, inputs: int, outputs: int) -> Build:
    def build(module: ModuleType, symbols: Symbols) -> Formula:
        x, weight = variables(symbols, "x", rows, inputs), variables(symbols, "w", outputs, inputs)
        y, backward = taped(module.LinearFunction, x, weight, "exact")
        definition = [[sum(a * b for a, b in zip(row, out, strict=True)) for out in weight.array] for row in x.array]
        return Formula([x, weight], y, backward, Sym(definition, symbols))

    return build


def lora_linear(rows: int, inputs: int, outputs: int, rank: int, *, drops: bool = True) -> Build:
    """With dropout for an arbitrary mask; by definition the product with W + s B A on what the branch keeps."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        shapes = {"x": (rows, inputs), "w": (outputs, inputs), "a": (rank, inputs), "b": (outputs, rank)}
        x, weight, a, b = tensors = [variables(symbols, name, *shape) for name, shape in shapes.items()]
        kept = variables(symbols, "kept", rows, inputs) if drops else None
        y, backward = taped(module.LoraLinearFunction, *tensors, kept, SCALE, "exact")
        dropped = x.array * kept.array if drops else x.array
        definition = x.array @ weight.array.T + SCALE * (dropped @ (b.array @ a.array).T)
        return Formula(tensors, y, backward, Sym(definition, symbols))

    return build


def quantized_linear(rows: int, inputs: int, outputs: int, rank: int, tile: int, *, drops: bool = True) -> Build:
    """The linear part: for any levels and scales, which `dequantize` multiplies, a tile at a time."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        shapes = {"x": (rows, inputs), "a": (rank, inputs), "b": (outputs, rank)}
        x, a, b = tensors = [variables(symbols, name, *shape) for name, shape in shapes.items()]
        weight = variables(symbols, "w", outputs, inputs)
        kept = variables(symbols, "kept", rows, inputs) if drops else None
        stored = lambda codes, *_: SimpleNamespace(  # noqa: E731
            shape=codes.shape, dequantize=lambda _, tile_rows: codes[tile_rows]
        )
        plan = module._Plan(SCALE, "exact", tile, (outputs, inputs), stored)
        y, backward = taped(module.QuantizedLinearFunction, *tensors, kept, plan, weight, None, None, None)
        dropped = x.array * kept.array if drops else x.array
        definition = x.array @ weight.array.T + SCALE * (dropped @ (b.array @ a.array).T)
        return Formula(tensors, y, backward, Sym(definition, symbols))

    return build


def linear_cross_entropy(targets: Sequence[int], width: int, vocab: int, *, chunk: int) -> Build:
    """On the tape in chunks of tokens."""

    def build(module: ModuleType, symbols: Symbols) -> Formula:
        x, weight = variables(symbols, "x", len(targets), width), variables(symbols, "w", vocab, width)
        logits = x @ weight.mT
        places = constants(symbols, targets)
        y, backward = taped(module.LinearCrossEntropyFunction, x, weight, places, chunk, "exact")
        losses = [
            symbols.log(sum(symbols.exp(logit) for logit in row)) - row[target]
            for row, target in zip(logits.array, targets, strict=True)
        ]
        return Formula([x, weight], y, backward, Sym(sum(losses), symbols))

    return build

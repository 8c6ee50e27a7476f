"""Forward and gradients of each operation as float64 NumPy, from their definitions, sharing no line with the product.

A `Problem` is one set of inputs with both. The forwards take complex numbers too, whose imaginary part is a derivative
without cancellation (the complex step). No two dimensions of a problem are equal, so a lost transpose cannot hide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrenar.ops.lora_linear import draw_kept
from entrenar.ops.quantized.nf4 import Nf4Weight

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Problem:
    """Inputs, the operation of a module bound to everything else, and what NumPy says."""

    name: str
    inputs: tuple[Array, ...]
    op: Callable[[ModuleType], Callable[..., Tensor]]
    forward: Callable[..., Array]
    gradients: Callable[..., tuple[Array, ...]]
    rounding: float = 1e-13

    def dy(self) -> Array:
        """Return the cotangent."""
        return np.random.default_rng(5).standard_normal(self.forward(*self.inputs).shape)


def worst_error(problem: Problem, module: ModuleType) -> float:
    """Return the largest error of output and gradients, relative to each one's largest entry; inf for a wrong shape."""
    inputs = [torch.from_numpy(x.copy()).requires_grad_() for x in problem.inputs]
    y = problem.op(module)(*inputs)
    dy = problem.dy()
    got = [y, *torch.autograd.grad(y, inputs, torch.from_numpy(dy), allow_unused=True)]
    expected = [problem.forward(*problem.inputs), *problem.gradients(dy, *problem.inputs)]
    return max(relative(a, b) for a, b in zip(got, expected, strict=True))


def relative(got: Tensor | None, want: Array) -> float:
    if got is None:
        return 1.0 if want.any() else 0.0
    if tuple(got.shape) != want.shape:
        return float("inf")
    error = np.abs(got.detach().numpy() - want).max() / np.abs(want).max()
    return float("inf") if np.isnan(error) else float(error)


def drawn(seed: int, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    generator = np.random.default_rng(seed)
    return tuple(generator.standard_normal(shape) for shape in shapes)


def softmax(z: Array) -> Array:
    """Along the last axis; a complex number is shifted by the largest real part."""
    weights = np.exp(z - z.real.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def seen(queries: int, keys: int, rows: list[list[int]]) -> Array:
    """Return (B, 1, T, S): whether a query may see a key, by place and by document."""
    place = np.arange(queries)[:, None] + keys - queries >= np.arange(keys)
    ids = np.asarray(rows)
    return (place & (ids[:, :, None] == ids[:, None, :]) if rows[0] else place[None])[:, None]


def attention_forms(mask: Array, scale: float, repeats: int) -> tuple[Callable[..., Array], Callable[..., Any]]:
    def parts(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        keys, values = k.repeat(repeats, 1), v.repeat(repeats, 1)
        scores = np.einsum("bhik,bhjk->bhij", q, keys) * scale
        return softmax(np.where(mask, scores, -np.inf)), keys, values

    def forward(q: Array, k: Array, v: Array) -> Array:
        p, _, values = parts(q, k, v)
        return np.einsum("bhij,bhjk->bhik", p, values)

    def gradients(dy: Array, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        p, keys, values = parts(q, k, v)
        dp = np.einsum("bhik,bhjk->bhij", dy, values)
        jacobian = np.einsum("bhij,jl->bhijl", p, np.eye(p.shape[-1])) - np.einsum("bhij,bhil->bhijl", p, p)
        ds = np.einsum("bhijl,bhij->bhil", jacobian, dp) * scale
        dk = np.einsum("bhij,bhik->bhjk", ds, q)
        dv = np.einsum("bhij,bhik->bhjk", p, dy)
        batch, heads, num_keys, width = dk.shape
        grouped = (batch, heads // repeats, repeats, num_keys, width)
        return np.einsum("bhij,bhjk->bhik", ds, keys), dk.reshape(grouped).sum(2), dv.reshape(grouped).sum(2)

    return forward, gradients


def attention_problem(
    name: str, path: Callable[[ModuleType, Any], Callable[..., Tensor]], rows: list[list[int]], keys: int = 5
) -> Problem:
    """Attend with 4 heads in 2 groups of width 3; `path` is one of the module's ways, given ids of documents."""
    queries, scale = 5, 0.41
    shapes = ((2, 4, queries, 3), (2, 2, keys, 3), (2, 2, keys, 3))
    forward, gradients = attention_forms(seen(queries, keys, rows), scale, 2)

    def op(module: ModuleType) -> Callable[..., Tensor]:
        way = path(module, module.Documents.from_ids(torch.tensor(rows)) if rows[0] else None)
        return lambda q, k, v: way(q, k, v, scale)

    return Problem(name, drawn(1, *shapes), op, forward, gradients)


def attention_problems() -> list[Problem]:
    free: list[list[int]] = [[], []]
    packed = [[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]

    def public(m: ModuleType, documents: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, scale: m.attention(q, k, v, scale=scale, documents=documents)

    def derived(m: ModuleType, _: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, scale: m.derived_attention(q, k, v, scale=scale, block_size=2)

    def reference(m: ModuleType, documents: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, scale: m.reference_attention(q, k, v, scale=scale, documents=documents)

    def split(m: ModuleType, documents: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, scale: m.fused_attention_by_document(q, k, v, scale, documents.spans)

    return [
        attention_problem("attention", public, free),
        attention_problem("attention, packed", public, packed),
        attention_problem("attention, cache", public, free, keys=7),
        attention_problem("derived", derived, free),
        attention_problem("derived, cache", derived, free, keys=7),
        attention_problem("reference, packed", reference, packed),
        attention_problem("split, packed", split, packed),
    ]


def rms_norm_problems() -> list[Problem]:
    eps = 0.3

    def forward(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def gradients(dy: Array, x: Array, weight: Array) -> tuple[Array, ...]:
        square = (x * x).mean(-1)[..., None, None] + eps
        outer = x[..., :, None] * x[..., None, :]
        jacobian = weight[:, None] * (np.eye(len(weight)) / square**0.5 - outer / len(weight) / square**1.5)
        normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return np.einsum("btij,bti->btj", jacobian, dy), (dy * normal).sum((0, 1))

    return [
        Problem("rms_norm", drawn(2, (2, 3, 5), (5,)), lambda m: lambda x, w: m.rms_norm(x, w, eps), forward, gradients)
    ]


def rope_problems() -> list[Problem]:
    (angles,) = drawn(3, (1, 4, 3))

    def turned(x: Array, angle: Array) -> Array:
        """Multiply each plane by its rotation matrix."""
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        matrix = np.stack((np.stack((cos, -sin), -1), np.stack((sin, cos), -1)), -2)
        planes = np.stack((x[..., :3], x[..., 3:]), -1)
        result = np.einsum("bhtpij,bhtpj->bhtpi", np.broadcast_to(matrix, (*planes.shape, 2)), planes)
        return np.concatenate((result[..., 0], result[..., 1]), -1)

    def op(module: ModuleType) -> Callable[..., Tensor]:
        cos, sin = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
        return lambda x: module.rope(x, cos, sin)

    return [
        Problem(
            "rope", drawn(4, (2, 5, 4, 6)), op,
            lambda x: turned(x, angles), lambda dy, _: (turned(dy, -angles),),
        )
    ]  # fmt: skip


def swiglu_problems() -> list[Problem]:
    def forward(gate: Array, up: Array) -> Array:
        return gate / (1 + np.exp(-gate)) * up

    def gradients(dy: Array, gate: Array, up: Array) -> tuple[Array, ...]:
        grown = np.exp(-gate)
        return dy * up * (1 + grown + gate * grown) / (1 + grown) ** 2, dy * gate / (1 + grown)

    inputs = drawn(6, (2, 3, 4), (2, 3, 4))
    return [Problem("swiglu", inputs, lambda m: m.swiglu, forward, gradients)]


def linear_problems() -> list[Problem]:
    """The derived path itself, which the public operation takes where two dtypes are at work."""

    def op(module: ModuleType) -> Callable[..., Tensor]:
        return lambda x, weight: module.LinearFunction.apply(x, weight, torch.float64)

    def gradients(dy: Array, x: Array, weight: Array) -> tuple[Array, ...]:
        return np.einsum("bto,oi->bti", dy, weight), np.einsum("bto,bti->oi", dy, x)

    inputs = drawn(7, (2, 3, 5), (4, 5))
    return [Problem("linear", inputs, op, lambda x, w: np.einsum("bti,oi->bto", x, w), gradients)]


def adapter_forms(kept: Array | None, scale: float) -> tuple[Callable[..., Array], Callable[..., Any]]:
    """Return the product with W + s B A, where the adapter sees only what is kept."""

    def forward(x: Array, weight: Array, a: Array, b: Array) -> Array:
        low = np.einsum("bti,ri->btr", x if kept is None else x * kept, a)
        return np.einsum("bti,oi->bto", x, weight) + scale * np.einsum("btr,or->bto", low, b)

    def gradients(dy: Array, x: Array, weight: Array, a: Array, b: Array) -> tuple[Array, ...]:
        mask = np.ones_like(x) if kept is None else kept
        dx = np.einsum("bto,oi->bti", dy, weight) + scale * np.einsum("bto,or,ri->bti", dy, b, a) * mask
        da = scale * np.einsum("bto,or,bti->ri", dy, b, x * mask)
        db = scale * np.einsum("bto,ri,bti->or", dy, a, x * mask)
        return dx, np.einsum("bto,bti->oi", dy, x), da, db

    return forward, gradients


def lora_linear_problems() -> list[Problem]:
    scale, dropout, shape = 1.7, 0.4, (2, 3, 6)
    inputs = drawn(8, shape, (5, 6), (4, 6), (5, 4))

    def op(module: ModuleType, dropout: float) -> Callable[..., Tensor]:
        return lambda *x: module.lora_linear(
            *x, scale=scale, dropout=dropout, generator=torch.Generator().manual_seed(9)
        )

    kept, chance = draw_kept(torch.empty(shape), dropout, torch.Generator().manual_seed(9))  # drawn, not derived
    return [
        Problem("lora_linear", inputs, lambda m: op(m, 0.0), *adapter_forms(None, scale)),
        Problem("dropout", inputs, lambda m: op(m, dropout), *adapter_forms(kept.numpy(), scale / chance)),
    ]


LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)  # fmt: skip
SCALE_LEVELS = np.sort(np.array([0.0, 1.0] + [
    sign * 10.0 ** (decade - 6) * 0.9 * (0.1 / 0.9 + (step + 0.5) / 2**decade)
    for decade in range(7) for step in range(2**decade) for sign in (-1, 1)
]))  # fmt: skip


def widened(codes: Array, magnitudes: Array, shape: tuple[int, int]) -> Array:
    """Return the numbers that codes stand for, one by one."""
    nibbles = [half for byte in codes for half in divmod(int(byte), 16)][: shape[0] * shape[1]]
    numbers = [LEVELS[code] * magnitudes[place // 64] for place, code in enumerate(nibbles)]
    return np.array(numbers, dtype=np.float64).reshape(shape)


def quantized_linear_problems() -> list[Problem]:
    """Over 7 rows of 22 numbers, in three blocks of which the last is shorter, two rows to a tile."""
    scale, dropout, shape, x_shape = 1.3, 0.4, (7, 22), (2, 3, 22)
    generator = np.random.default_rng(12)
    codes = generator.integers(0, 256, 77).astype(np.uint8)
    magnitudes = generator.uniform(0.5, 2, 3).astype(np.float32)
    scale_codes, spread, offset = generator.integers(0, 256, 3).astype(np.uint8), np.float32(0.8), np.float32(1.2)
    kept, chance = draw_kept(torch.empty(x_shape), dropout, torch.Generator().manual_seed(9))

    def problem(name: str, weight: Array, scales: tuple[Any, ...], dropout: float, rounding: float) -> Problem:
        tensors = [None if part is None else torch.from_numpy(np.asarray(part)) for part in (codes, *scales)]

        def op(module: ModuleType) -> Callable[..., Tensor]:
            return lambda x, a, b: module.quantized_linear(
                x, Nf4Weight(*tensors, shape), a, b, scale=scale, dropout=dropout,
                generator=torch.Generator().manual_seed(9), tile_rows=2,
            )  # fmt: skip

        forward, all_gradients = adapter_forms(kept.numpy(), scale / chance) if dropout else adapter_forms(None, scale)

        def gradients(dy: Array, x: Array, a: Array, b: Array) -> tuple[Array, ...]:
            dx, _, da, db = all_gradients(dy, x, weight, a, b)
            return dx, da, db

        return Problem(
            name, drawn(11, x_shape, (4, 22), (7, 4)), op, lambda x, a, b: forward(x, weight, a, b), gradients, rounding
        )  # fmt: skip

    twice = widened(codes, SCALE_LEVELS[scale_codes] * float(spread) + float(offset), shape)
    return [
        problem("quantized once", widened(codes, magnitudes, shape), (magnitudes, None, None), 0.0, 1e-13),
        problem("quantized twice", twice, (scale_codes, spread[None], offset), 0.0, 3e-7),
        problem("dropout", twice, (scale_codes, spread[None], offset), dropout, 3e-7),
    ]


def linear_cross_entropy_problems() -> list[Problem]:
    targets = np.array([3, -100, 0, 6, 1])
    kept = targets != -100

    def probabilities(x: Array, weight: Array) -> Array:
        return softmax(x[kept] @ weight.T)

    def forward(x: Array, weight: Array) -> Array:
        chosen = np.take_along_axis(probabilities(x, weight), targets[kept, None], -1)
        return -np.log(chosen).sum()

    def gradients(dy: Array, x: Array, weight: Array) -> tuple[Array, ...]:
        dz = probabilities(x, weight) - np.eye(len(weight))[targets[kept]]
        dx = np.zeros_like(x)
        dx[kept] = dz @ weight
        return dy * dx, dy * np.einsum("nv,nd->vd", dz, x[kept])

    def op(module: ModuleType) -> Callable[..., Tensor]:
        return lambda x, w: module.linear_cross_entropy(x, w, torch.from_numpy(targets), chunk_size=3)

    return [Problem("linear_cross_entropy", drawn(10, (5, 4), (7, 4)), op, forward, gradients)]


def problems() -> dict[str, list[Problem]]:
    """Return the problems of each operation."""
    return {
        "attention": attention_problems(),
        "linear": linear_problems(),
        "linear_cross_entropy": linear_cross_entropy_problems(),
        "lora_linear": lora_linear_problems(),
        "quantized_linear": quantized_linear_problems(),
        "rms_norm": rms_norm_problems(),
        "rope": rope_problems(),
        "swiglu": swiglu_problems(),
    }


TOLERANCE = 1e-6  # a thousandth of the specification's; what is right lies below 1e-14


def caught_by(problems: list[Problem], module: ModuleType) -> list[str]:
    """Return the problems that a module gets wrong."""
    return [problem.name for problem in problems if worst_error(problem, module) > TOLERANCE]

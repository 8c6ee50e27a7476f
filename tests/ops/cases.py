"""The table of operations: for each its inputs, its reference, and backwards that are known to be wrong.

`tests/ops/test_every_op.py` runs each row; an operation of `ops.__all__` without a row fails there. A wrong backward is
an arithmetic slip that someone has shipped or could ship; a gradient check that lets one pass checks nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entrenar import ops
from entrenar.ops.attention import causal_mask, reference_attention
from entrenar.ops.linear import reference_linear
from entrenar.ops.linear_cross_entropy import reference_linear_cross_entropy
from entrenar.ops.lora_linear import reference_lora_linear
from entrenar.ops.quantized.linear import reference_quantized_linear
from entrenar.ops.quantized.nf4 import dequantize_nf4, quantize_nf4
from entrenar.ops.rms_norm import reference_rms_norm
from entrenar.ops.rope import reference_rope, rope_forward
from entrenar.ops.swiglu import reference_swiglu

Operation = Callable[..., Tensor]
Gradients = tuple[Tensor, ...]
Backward = Callable[..., Gradients]  # (dy, *inputs) -> one gradient for each input


@dataclass(frozen=True)
class Example:
    """One operation with everything bound but the tensors that carry gradients."""

    inputs: tuple[Tensor, ...]
    op: Operation
    reference: Operation
    wrong: dict[str, Backward] = field(default_factory=dict)


def vjp(function: Operation, dy: Tensor, *inputs: Tensor) -> Gradients:
    """Return the gradients of dy · function(inputs) as autograd finds them."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        return torch.autograd.grad(function(*leaves), leaves, dy)


def scaled(function: Operation, *factors: float) -> Backward:
    """Return the right backward with each gradient times a factor."""
    return lambda dy, *inputs: tuple(g * f for g, f in zip(vjp(function, dy, *inputs), factors, strict=True))


def of_another(function: Operation) -> Backward:
    """Return the backward of a function that is almost the operation."""
    return lambda dy, *inputs: vjp(function, dy, *inputs)


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw a normal tensor; every dtype sees the same numbers, rounded."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def rms_norm_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    eps = 1e-2  # large enough to matter

    def detached_rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps).detach() * weight

    def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
        return reference_rms_norm(x - x.mean(-1, keepdim=True), weight, eps)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return reference_rms_norm(x, weight, eps)

    def sum_for_mean(dy: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        right, direct = vjp(reference, dy, x, weight), vjp(detached_rms, dy, x, weight)
        return direct[0] + (right[0] - direct[0]) * x.shape[-1], right[1]

    return Example(
        inputs=(draw(generator, dtype, batch, time, 6), 1 + draw(generator, dtype, 6) / 4),
        op=lambda x, weight: ops.rms_norm(x, weight, eps),
        reference=reference,
        wrong={
            "root mean square taken as constant": of_another(detached_rms),
            "mean subtracted": of_another(layer_norm),
            "1/D missing": sum_for_mean,
            "eps missing": of_another(lambda x, weight: reference_rms_norm(x, weight, 0.0)),
            "weight missing in dx": lambda dy, x, w: (
                vjp(reference, dy, x, torch.ones_like(w))[0],
                vjp(reference, dy, x, w)[1],
            ),
            "reciprocal missing in dweight": lambda dy, x, w: (vjp(reference, dy, x, w)[0], (dy * x).sum((0, 1))),
            "dweight of the last row alone": lambda dy, x, w: (
                vjp(reference, dy, x, w)[0],
                vjp(reference, dy[-1:, -1:], x[-1:, -1:], w)[1],
            ),
        },
    )


def rope_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    wide = torch.promote_types(dtype, torch.float32)
    angles = draw(generator, wide, 1, time, 3)
    cos, sin = angles.cos(), angles.sin()

    def forward_rotation(dy: Tensor, x: Tensor) -> Gradients:
        return (torch.cat(rope_forward(*dy.chunk(2, -1), cos[:, None], sin[:, None]), dim=-1),)

    def interleaved(x: Tensor) -> Tensor:
        even, odd = rope_forward(x[..., ::2], x[..., 1::2], cos[:, None], sin[:, None])
        return torch.stack((even, odd), dim=-1).flatten(-2)

    return Example(
        inputs=(draw(generator, dtype, batch, 2, time, 6),),
        op=lambda x: ops.rope(x, cos, sin),
        reference=lambda x: reference_rope(x, cos, sin),
        wrong={
            "sine not negated": forward_rotation,
            "planes interleaved": of_another(interleaved),
            "rotation dropped": of_another(torch.clone),
            "angles of the token before": of_another(lambda x: reference_rope(x, cos.roll(1, 1), sin.roll(1, 1))),
        },
    )


def swiglu_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    def swapped(dy: Tensor, gate: Tensor, up: Tensor) -> Gradients:
        dgate, dup = vjp(reference_swiglu, dy, gate, up)
        return dup, dgate

    def sigmoid_constant(gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(gate).detach() * up

    return Example(
        inputs=(draw(generator, dtype, batch, time, 5) * 2, draw(generator, dtype, batch, time, 5)),
        op=ops.swiglu,
        reference=reference_swiglu,
        wrong={
            "sigmoid taken as constant": of_another(sigmoid_constant),
            "gate and up swapped": swapped,
            "activation of up": of_another(lambda gate, up: reference_swiglu(up, gate)),
            "gelu for silu": of_another(lambda gate, up: torch.nn.functional.gelu(gate) * up),
            "up missing in dgate": lambda dy, gate, up: (
                vjp(reference_swiglu, dy, gate, torch.ones_like(up))[0],
                vjp(reference_swiglu, dy, gate, up)[1],
            ),
        },
    )


def attention_wrongs(groups: int, documents: ops.Documents | None) -> dict[str, Backward]:
    """Return the slips of an attention backward."""

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, k, v, documents=documents)

    def parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        repeats = q.shape[1] // groups
        keys, values = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        seen = causal_mask(q.shape[2], k.shape[2])
        if documents is not None:
            seen = seen & (documents.ids[:, None, :, None] == documents.ids[:, None, None, :])
        scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        return torch.softmax(scores, -1), keys, values

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).sum(2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // groups
        keys, values = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return torch.softmax(q @ keys.mT / math.sqrt(q.shape[-1]), -1) @ values

    def softmax_uncentered(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        p, keys, values = parts(q, k, v)
        ds = p * (dy @ values.mT) / math.sqrt(q.shape[-1])
        return ds @ keys, grouped(ds.mT @ q), grouped(p.mT @ dy)

    def untransposed(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        p, keys, values = parts(q, k, v)
        dp = dy @ values.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return ds @ keys, grouped(ds @ q), grouped(p @ dy)

    def first_of_group(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        dq, _, _ = vjp(reference, dy, q, k, v)
        step = q.shape[1] // groups
        _, dk, dv = vjp(reference, dy[:, ::step], q[:, ::step], k, v)
        return dq, dk, dv

    wrong = {
        "scale missing": lambda dy, q, k, v: scaled(reference, math.sqrt(q.shape[-1]), math.sqrt(q.shape[-1]), 1)(
            dy, q, k, v
        ),
        "causal mask dropped": of_another(dense),
        "softmax not centered": softmax_uncentered,
        "transpose missing": untransposed,
        "one query head of each group": first_of_group,
        "dq and dk swapped": lambda dy, q, k, v: (
            vjp(reference, dy, q, k, v)[1].repeat_interleave(q.shape[1] // groups, 1),
            grouped(vjp(reference, dy, q, k, v)[0]),
            vjp(reference, dy, q, k, v)[2],
        ),
    }
    if documents is not None:
        wrong["document mask dropped"] = of_another(reference_attention)
    return wrong


def attention_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    groups = 2
    return Example(
        inputs=tuple(draw(generator, dtype, batch, heads, time, 3) for heads in (4, groups, groups)),
        op=ops.attention,
        reference=reference_attention,
        wrong=attention_wrongs(groups, None),
    )


def packed_attention_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    groups = 1
    rows = [[min(place // (2 + row % 2), 2) for place in range(time)] for row in range(batch)]
    documents = ops.Documents.from_ids(torch.tensor(rows, dtype=torch.int64).reshape(batch, time))
    return Example(
        inputs=tuple(draw(generator, dtype, batch, heads, time, 3) for heads in (2, groups, groups)),
        op=lambda q, k, v: ops.attention(q, k, v, documents=documents),
        reference=lambda q, k, v: reference_attention(q, k, v, documents=documents),
        wrong=attention_wrongs(groups, documents),
    )


def linear_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    wide = torch.promote_types(dtype, torch.float32)

    def op(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear(x, weight, wide if wide != dtype else None)

    return Example(
        inputs=(draw(generator, dtype, batch, time, 4), draw(generator, dtype, 4, 4)),
        op=op,
        reference=lambda x, weight: reference_linear(x, weight, wide),
        wrong={
            "transpose missing": of_another(lambda x, weight: x @ weight),
            "operands swapped": lambda dy, x, w: (
                vjp(reference_linear, dy, x, w)[0],
                vjp(reference_linear, dy, x, w)[1].mT,
            ),
        },
    )


def lora_linear_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    scale, dropout = 1.5, 0.4

    def dropped(function: Operation) -> Operation:
        return lambda *inputs: function(
            *inputs, scale=scale, dropout=dropout, generator=torch.Generator().manual_seed(6)
        )

    reference = dropped(reference_lora_linear)

    def undropped(*inputs: Tensor) -> Tensor:
        return reference_lora_linear(*inputs, scale=scale)

    def one_of(place: int, function: Operation) -> Backward:
        def backward(dy: Tensor, *inputs: Tensor) -> Gradients:
            gradients = list(vjp(reference, dy, *inputs))
            gradients[place] = vjp(function, dy, *inputs)[place]
            return tuple(gradients)

        return backward

    return Example(
        inputs=tuple(draw(generator, dtype, *shape) for shape in ((batch, time, 4), (4, 4), (2, 4), (4, 2))),
        op=dropped(ops.lora_linear),
        reference=reference,
        wrong={
            "scale missing": of_another(lambda *inputs: undropped(*inputs[:3], inputs[3] / scale)),
            "dropout mask missing in dx": one_of(0, undropped),
            "dropout mask missing in dA": one_of(2, undropped),
            "frozen product missing in dx": one_of(0, lambda x, w, a, b: reference(x, w * 0, a, b)),
            "transpose missing": of_another(lambda x, w, a, b: reference(x, w.mT, a, b)),
        },
    )


def quantized_linear_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    scale, dropout = 1.5, 0.4
    # 9 rows of 22: four blocks, the last one shorter, and tiles that begin in the middle of a block
    weight = quantize_nf4(draw(torch.Generator().manual_seed(7), torch.float32, 9, 22))
    wide = torch.promote_types(dtype, torch.float32)

    def op(*inputs: Tensor) -> Tensor:
        return ops.quantized_linear(
            inputs[0], weight, *inputs[1:], scale=scale, dropout=dropout, generator=torch.Generator().manual_seed(6),
            compute_dtype=wide, tile_rows=4,
        )  # fmt: skip

    def over(weight: ops.Nf4Weight, dropout: float = dropout) -> Operation:
        return lambda *inputs: reference_quantized_linear(
            inputs[0], weight, *inputs[1:], scale=scale, dropout=dropout, generator=torch.Generator().manual_seed(6)
        )

    def one_of(place: int, function: Operation) -> Backward:
        def backward(dy: Tensor, *inputs: Tensor) -> Gradients:
            gradients = list(vjp(over(weight), dy, *inputs))
            gradients[place] = vjp(function, dy, *inputs)[place]
            return tuple(gradients)

        return backward

    def last_tile_dropped(*inputs: Tensor) -> Tensor:
        x, lora_a, lora_b = inputs
        missing = x @ torch.nn.functional.pad(dequantize_nf4(weight, x.dtype)[8:], (0, 0, 8, 0)).mT
        return over(weight)(x, lora_a, lora_b) - missing

    halves_swapped = ops.Nf4Weight(
        weight.codes << 4 | weight.codes >> 4, weight.absmax, weight.nested_absmax, weight.offset, weight.shape
    )
    scales_shifted = ops.Nf4Weight(
        weight.codes, weight.absmax.roll(1), weight.nested_absmax, weight.offset, weight.shape
    )
    return Example(
        inputs=tuple(draw(generator, dtype, *shape) for shape in ((batch, time, 22), (2, 22), (9, 2))),
        op=op,
        reference=over(weight),
        wrong={
            "high and low half swapped in dx": one_of(0, over(halves_swapped)),
            "scale of the block before in dx": one_of(0, over(scales_shifted)),
            "last tile missing in dx": one_of(0, last_tile_dropped),
            "dropout mask missing in dx": one_of(0, over(weight, 0.0)),
            "dropout mask missing in dA": one_of(1, over(weight, 0.0)),
        },
    )


def linear_cross_entropy_example(batch: int, time: int, dtype: torch.dtype, generator: torch.Generator) -> Example:
    tokens, width, vocab = batch * time, 3, 5
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[1::4] = -100
    kept = max(1, int((targets != -100).sum()))

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return reference_linear_cross_entropy(x, weight, targets)

    def ignored_kept(x: Tensor, weight: Tensor) -> Tensor:
        return reference_linear_cross_entropy(x, weight, targets.clamp_min(0))

    def without_target(x: Tensor, weight: Tensor) -> Tensor:
        return torch.logsumexp((x @ weight.mT)[targets != -100], -1).sum()

    def shifted(x: Tensor, weight: Tensor) -> Tensor:
        return reference_linear_cross_entropy(x, weight, targets.roll(1))

    return Example(
        inputs=(draw(generator, dtype, tokens, width), draw(generator, dtype, vocab, width)),
        op=lambda x, weight: ops.linear_cross_entropy(x, weight, targets, chunk_size=2),
        reference=reference,
        wrong={
            "upstream gradient ignored": lambda dy, *inputs: vjp(reference, torch.ones_like(dy), *inputs),
            "mean for sum": scaled(reference, 1 / kept, 1 / kept),
            "one-hot not subtracted": of_another(without_target),
            "ignored rows counted": of_another(ignored_kept),
            "targets off by one": of_another(shifted),
            "last chunk alone in dweight": lambda dy, x, w: (
                vjp(reference, dy, x, w)[0],
                vjp(lambda x, w: reference_linear_cross_entropy(x[-2:], w, targets[-2:]), dy, x, w)[1],
            ),
        },
    )


def with_generic_wrongs(build: Callable[..., Example]) -> Callable[..., Example]:
    """Add the slips that every backward can have: zeros, a flipped sign, one gradient a little too large."""

    def example(*arguments: object) -> Example:
        plain = build(*arguments)
        count = len(plain.inputs)
        wrong = {
            "zero": scaled(plain.reference, *[0.0] * count),
            "sign flipped": scaled(plain.reference, *[-1.0] * count),
        }
        for place in range(count):
            factors = [1.01 if other == place else 1.0 for other in range(count)]
            wrong[f"input {place} one per cent large"] = scaled(plain.reference, *factors)
        return Example(plain.inputs, plain.op, plain.reference, wrong | plain.wrong)

    return example


def table() -> dict[str, Callable[..., Example]]:
    """Return the builder of each row; a row of an operation's variant is named operation/variant."""
    rows = {
        "attention": attention_example,
        "attention/packed": packed_attention_example,
        "linear": linear_example,
        "linear_cross_entropy": linear_cross_entropy_example,
        "lora_linear": lora_linear_example,
        "quantized_linear": quantized_linear_example,
        "rms_norm": rms_norm_example,
        "rope": rope_example,
        "swiglu": swiglu_example,
    }
    return {name: with_generic_wrongs(build) for name, build in rows.items()}

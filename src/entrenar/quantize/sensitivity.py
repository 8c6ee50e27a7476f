"""Estimate how much the loss rises when a matrix is rounded, from one forward and backward over a calibration text.

With dy the gradient of the loss at the product's output for a token, x its input and D the error of the weight, the
loss rises, to second order, by about

    ½ Σ over tokens (dy · D x)²                                                       (1)

which is the Fisher information of the weight along D, the tokens taken as independent (LeCun et al. 1990, "Optimal
brain damage"; Kim et al. 2023, arXiv:2306.07629, weighs by its diagonal). No matrix needs a forward of its own: D for
all widths is computed where dy is at hand. For the head, whose output is the logits z with probabilities p, the rise is

    ½ Σ over tokens of the variance of D x under p                                    (2)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entrenar import ops
from entrenar.model import Llama
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.quantize.budget import EMBEDDING, HEAD

# Logits of this many tokens at once.
_TOKENS_AT_ONCE = 256


def rounding_errors(weight: Float[Tensor, "O I"]) -> Iterator[tuple[int, Float[Tensor, "O I"]]]:
    """Yield each width and the error D of the weight in it, in float32."""
    plain = weight.detach().float()
    for bits in WIDTHS:
        yield bits, ops.dequantize_nf_bits(ops.quantize_nf_bits(plain, bits, is_draft=True)) - plain


@contextmanager
def watched_projections(projections: Mapping[str, nn.Module], losses: dict[str, dict[int, float]]) -> Iterator[None]:
    """Add equation (1) of each projection and width to `losses`, at each backward inside.

    The inputs must require a gradient, the weights need not.
    """

    def watch(name: str, module: nn.Module) -> Callable[..., None]:
        def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda dy: add(name, module, x, dy))  # type: ignore[no-untyped-call]  # torch's own

        return on_forward

    def add(name: str, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        rows, drows = x.flatten(0, -2).float(), dy.flatten(0, -2).float()  # (N, I), (N, O)
        for bits, error in rounding_errors(module.get_parameter("weight")):
            rise = 0.5 * float(((rows @ error.mT) * drows).sum(1).square().sum())
            losses[name][bits] = losses[name].get(bits, 0.0) + rise

    handles = [module.register_forward_hook(watch(name, module)) for name, module in projections.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embedding_losses(
    weight: Float[Tensor, "V D"], ids: Int[Tensor, " N"], dx: Float[Tensor, "N D"]
) -> dict[int, float]:
    """Return equation (1) of an embedding; its error at a token is a row of D."""
    return {
        bits: 0.5 * float((error[ids] * dx.float()).sum(1).square().sum()) for bits, error in rounding_errors(weight)
    }


def head_losses(weight: Float[Tensor, "V D"], x: Float[Tensor, "N D"]) -> dict[int, float]:
    """Return equation (2) of a head."""
    losses: dict[int, float] = {}
    plain, rows = weight.detach().float(), x.detach().float()
    for bits, error in rounding_errors(weight):
        losses[bits] = 0.0
        for part in rows.split(_TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]  # torch's own
            shares, moved = torch.softmax(part @ plain.mT, -1), part @ error.mT  # (n, V)
            mean = (shares * moved).sum(1, keepdim=True)
            losses[bits] += 0.5 * float((shares * (moved - mean).square_()).sum())
    return losses


def sensitivities(
    model: Llama, matrices: Mapping[str, nn.Module], rows: Int[Tensor, "rows length"]
) -> dict[str, dict[int, float]]:
    """Return the estimated rise of the loss, summed over the rows' targets, for each matrix and width."""
    losses: dict[str, dict[int, float]] = {name: {} for name in matrices}
    model.requires_grad_(requires_grad=False)
    model.eval()
    states: list[Tensor] = []
    embedded = model.model.embed_tokens.register_forward_hook(lambda _, __, out: states.append(out.requires_grad_()))
    projections = {name: module for name, module in matrices.items() if name not in (EMBEDDING, HEAD)}
    ids, head = rows[:, :-1], cast(Tensor, model.head_weight)
    try:
        with watched_projections(projections, losses):
            hidden = model.hidden(ids).flatten(0, 1)
            targets = rows[:, 1:].flatten()
            torch.autograd.backward(ops.linear_cross_entropy(hidden, head, targets, compute_dtype=model.compute_dtype))
    finally:
        embedded.remove()
    gradient = cast(Tensor, states[0].grad)
    of_embedding = embedding_losses(model.model.embed_tokens.weight, ids.flatten(), gradient.flatten(0, 1))
    of_head = head_losses(head, hidden)
    is_tied = HEAD not in matrices
    losses[EMBEDDING] = {w: of_embedding[w] + (of_head[w] if is_tied else 0.0) for w in WIDTHS}
    if not is_tied:
        losses[HEAD] = of_head
    return losses

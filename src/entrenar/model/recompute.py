"""Activation checkpointing: keep the input of a piece of the model, and compute the rest again in the backward.

Chen et al. 2016, arXiv:1604.06174, on hooks over what the tape saves: in the forward each saved tensor is replaced by
its number; when the backward asks for the first of them, the piece runs once more, with the random numbers it had, and
its saved tensors are handed out and forgotten one by one. The second run ends as soon as all are there.

`torch.utils.checkpoint` does the same, and loads torch's compiler and symbolic algebra at its first call: 65 MB and
seconds, more than the activations of a small model. It is used where the compiler is at work anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class _AllSaved(Exception):
    """The second run has saved what the first one did."""


class _InputOnTape(torch.autograd.Function):
    """Puts a tensor on the tape and nothing else, so that hooks around the model see it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        """Save x; the anchor requires a gradient, or there would be no tape."""
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> None:
        """Never run: nothing depends on the output."""


class _Piece:
    """One repeatable run of a piece of the model."""

    def __init__(self, piece: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._piece, self._requires_grad = piece, x.requires_grad
        put: Callable[..., Tensor] = _InputOnTape.apply
        self._tape: Any = put(torch.empty(0, requires_grad=True), x).grad_fn
        self._random = torch.get_rng_state()
        self._device_random = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        self._count = 0
        self._saved: list[Tensor | None] = []

    def pack(self, _: Tensor) -> int:
        """Number a tensor that the first run saves."""
        self._count += 1
        return self._count - 1

    def unpack(self, number: int) -> Tensor:
        """Return a tensor that the first run saved, once."""
        tensor = self._saved[number] if self._saved else None
        if tensor is None:
            self._run_again()
            tensor = self._saved[number]
        self._saved[number] = None
        return cast(Tensor, tensor)

    def _run_again(self) -> None:
        (x,) = self._tape.saved_tensors
        saved: list[Tensor | None] = []

        def keep(tensor: Tensor) -> None:
            saved.append(tensor.detach())
            if len(saved) == self._count:
                raise _AllSaved

        hooks = saved_tensors_hooks(keep, lambda _: x)
        with self._replayed(x), torch.enable_grad(), suppress(_AllSaved), hooks:
            self._piece(x.detach().requires_grad_(self._requires_grad))
        self._saved = saved

    @contextmanager
    def _replayed(self, x: Tensor) -> Iterator[None]:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.set_rng_state(self._random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, x.device)
            yield


def recomputed(piece: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return piece(x), of which the tape holds x alone; the gradients are the same to the last bit."""
    if torch.compiler.is_compiling():
        out: Tensor = checkpoint(piece, x, use_reentrant=False)
        return out
    run = _Piece(piece, x)
    with saved_tensors_hooks(run.pack, run.unpack):
        return piece(x)

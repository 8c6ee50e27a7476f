"""Stand-ins without bytes for the two levers that move memory during a step: streamed layers and offloading."""

from collections import deque
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from entrenar.model import Llama, TokenBatch
from entrenar.model.batch_loss import BatchLoss
from entrenar.planning.ledger import Ledger
from entrenar.train.offload import BEHIND_BYTES, LEAST_BYTES


class RehearsedStream:
    """Stands for `model.streaming.LayerStream`: the mapped weights of a layer are there while the layer is used.

    Attributes:
        size_bytes: what all layers together bring and release.
    """

    def __init__(self, model: Llama, mapped: Sequence[Tensor], ledger: Ledger) -> None:
        own = {tensor.untyped_storage()._cdata for tensor in mapped}
        self._sizes = [
            sum(t.nbytes for t in chain(layer.parameters(), layer.buffers()) if t.untyped_storage()._cdata in own)
            for layer in model.model.layers
        ]
        self.size_bytes = sum(self._sizes)
        self._ledger = ledger
        self._held: Tensor | None = None

    def begin(self, layer: int) -> None:
        """Hold this layer and no other; the ledger counts it as weights, apart from those that stay mapped."""
        self._held = None
        self._held = torch.empty(self._sizes[layer], dtype=torch.uint8, device="meta")
        self._ledger.mark([self._held], "weights")

    def end(self, layer: int, out: Tensor) -> None:
        """Release it until the backward reaches it."""
        self._held = None
        if out.requires_grad:
            out.register_hook(lambda _: self.begin(layer))  # type: ignore[no-untyped-call]


def offloaded(model: Llama, loss: BatchLoss) -> BatchLoss:
    """Return a loss whose tape releases large activations and restores them, in imitation of `train.offload`."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], torch.dtype]:
        is_kept = not tensor.is_meta or tensor.nbytes < LEAST_BYTES or tensor.untyped_storage()._cdata in own
        if not is_kept:
            behind.append(tensor.detach())
            while sum(one.nbytes for one in behind) > BEHIND_BYTES:
                behind.popleft()
        return tensor if is_kept else (tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(saved: Tensor | tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
        behind.clear()
        if isinstance(saved, Tensor):
            return saved
        shape, stride, dtype = saved
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    behind: deque[Tensor] = deque()

    def loss_with_offloading(batch: TokenBatch) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return loss(batch)

    return loss_with_offloading

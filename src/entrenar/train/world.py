"""The processes that train one model together, and how they agree.

Each process, a *rank*, sees its own share of every batch. What one rank decided alone would leave the others waiting
forever: how many targets a step had, whether its loss is finite, whether memory ran out, whether to stop. So the loop
never decides from its own view alone; it asks the world. One small reduction a step carries every answer.

The only thing a world needs from an engine is a sum over all ranks in place, such as `torch.distributed.all_reduce`.
One process alone is a world of size 1, in which every question answers itself.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class World:
    """This process among all that train together: number `rank` of `size`.

    `all_reduce` replaces a tensor by its sum over all ranks; every rank calls it in the same order. `pieces` is set
    where no rank holds the weights as a whole.
    """

    rank: int
    size: int
    all_reduce: Callable[[Tensor], Any]
    pieces: "Pieces | None" = None

    @staticmethod
    def alone() -> "World":
        """Return the world of a single process."""
        return World(0, 1, lambda _: None)

    @property
    def is_writer(self) -> bool:
        """Return whether this rank writes metrics, events and checkpoints."""
        return self.rank == 0

    def sum(self, **values: float) -> dict[str, float]:
        """Return each value's sum over all ranks, by one reduction in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        self.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, *, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return self.sum(flag=float(flag))["flag"] > 0

    def fault(self, own: str | None) -> str | None:
        """Return a fault that this rank found, or says that another did; None if all is well on all ranks.

        Ranks that hold the same find the same, and are not asked.
        """
        if self.pieces is None:
            return own
        return (own or "another rank has found a fault") if self.any(flag=own is not None) else None

    def largest(self, value: int) -> int:
        """Return the largest `value` of all ranks."""
        own = {str(rank): value if rank == self.rank else 0 for rank in range(self.size)}
        return int(max(self.sum(**own).values()))

    def broadcast(self, value: ValueT) -> ValueT:
        """Return the writer's `value`, made of what JSON can hold (NaN and infinity too)."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.is_writer else b""
        size = int(self.sum(size=len(content))["size"])
        payload = torch.zeros(size, dtype=torch.uint8)
        if self.is_writer:
            payload.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.all_reduce(payload)
        received: ValueT = json.loads(payload.numpy().tobytes())
        return received

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, by rank; JSON must be able to hold it."""
        content = json.dumps(value).encode()
        counted = self.sum(**{str(rank): float(len(content) * (rank == self.rank)) for rank in range(self.size)})
        sizes = [int(counted[str(rank)]) for rank in range(self.size)]
        payload = torch.zeros(sum(sizes), dtype=torch.uint8)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        payload[ends[self.rank] - len(content) : ends[self.rank]] = torch.frombuffer(
            bytearray(content), dtype=torch.uint8
        )
        self.add_up([payload])
        received = payload.numpy().tobytes()
        return [json.loads(received[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                self.all_reduce(tensor)


@dataclass(frozen=True)
class Pieces:
    """How a module's weights are spread over the ranks.

    Attributes:
        copies: how many ranks hold the same piece.
        writers: how many ranks, from the first on, hold one copy of the model together.
        whole: returns a tensor as a whole on the rank of that number, None elsewhere; every rank calls it in the same
            order, from one thread.
        apart: these ranks once more, over connections for that thread.
        reshard: puts the pieces back in the place of weights that a forward without a backward, as of an evaluation,
            has gathered and kept: those would be gone in the middle of a save.
        remainders: the low halves of float32 masters by parameter name, whole, where weights have become bfloat16.
    """

    copies: int
    writers: int
    whole: Callable[[Tensor, int], Tensor | None]
    apart: World
    reshard: Callable[[], None]
    remainders: Mapping[str, Tensor]

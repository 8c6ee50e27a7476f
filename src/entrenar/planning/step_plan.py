"""Predict how much memory and time a training step takes, before the run starts.

    peak = what the process holds already                        measured now
         + what kernels and libraries take at their first use    measured by a real step of a tiny model,
           and the graph and all small objects                   and after the rehearsal, which makes them too
         + weights in mapped files                               counted
         + what the heap covers for everything else              a rehearsal among the allocator's own blocks

What the heap covers is split into the tensors by use, counted, and the rest, which is holes. No constant is fitted.
Time is the products at this machine's rate plus all other bytes at its bandwidth; both are measured in a moment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from entrenar.planning.ledger import Ledger
from entrenar.planning.machine import Rates, measure_rates
from entrenar.planning.rehearsal import Scene, rehearse
from entrenar.train.oom import return_freed_memory


@dataclass(frozen=True)
class StepPlan:
    """Memory and time that a training step will take.

    Attributes:
        tensors: bytes by use at the moment of the peak.
        kernels_bytes: what kernels and libraries took at their first use, the graph and all small objects.
        allocator_bytes: what the heap holds in addition; None where the allocator cannot be asked.
        flops: what one step spends in products, adapters and recomputation included.
        moved_bytes: what all other operations of a step read and write.
        rates: the machine's, measured with the plan.
        checkpoint_bytes: the weights and optimizer state of one checkpoint.
    """

    trained_parameters: int
    trained_tensors: int
    tensors: Mapping[str, int]
    allocator_bytes: int | None
    imports_bytes: int
    kernels_bytes: int
    flops: int
    moved_bytes: int
    rates: Rates
    checkpoint_bytes: int

    @property
    def step_s(self) -> float:
        """How long a step takes."""
        return self.rates.seconds(self.flops, self.moved_bytes)

    @property
    def added_bytes(self) -> int:
        """The peak above what the process held before."""
        return self.kernels_bytes + sum(self.tensors.values()) + (self.allocator_bytes or 0)

    @property
    def peak_bytes(self) -> int:
        """The most that the process will hold."""
        return self.imports_bytes + self.added_bytes


def plan_step(
    build: Callable[[Ledger], Scene], imports_bytes: int, compute_dtype: torch.dtype, returned_from: int | None = None
) -> StepPlan:
    """Rehearse the step that `build` sets up and predict what it takes; see `Heap` for `returned_from`.

    `imports_bytes` is what the process held before it computed anything.
    """
    seen = rehearse(build, returned_from)
    # Measure the machine's rates last: their products leave buffers behind that no run has.
    rates = measure_rates(compute_dtype)
    return_freed_memory()
    in_heap = sum(seen.peak_bytes.values()) - seen.mapped_bytes
    return StepPlan(
        trained_parameters=seen.trained_parameters,
        trained_tensors=seen.trained_tensors,
        tensors=seen.peak_bytes,
        allocator_bytes=None if seen.heap_bytes is None else seen.heap_bytes - in_heap,
        imports_bytes=imports_bytes,
        kernels_bytes=max(seen.held_bytes - imports_bytes, 0),
        flops=seen.flops,
        moved_bytes=seen.moved_bytes,
        rates=rates,
        checkpoint_bytes=seen.trained_bytes + seen.state_bytes,
    )

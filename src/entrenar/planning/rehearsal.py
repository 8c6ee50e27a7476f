"""A training step without bytes: the real forward, backward, clipping and optimizer on meta tensors.

A ledger follows it. The rehearsal runs the product's own code, so it allocates what a run allocates, to the byte; a
test holds the two timelines equal. It takes two steps, because the first leaves holes in the heap that the second meets
(a third finds nothing new). Of all parameters of one shape and dtype the optimizer moves only one, with all gradients
present: a step of AdamW allocates nothing, and Muon needs memory for its largest matrix only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from entrenar.memory import status_bytes
from entrenar.planning.heap import Heap
from entrenar.planning.ledger import Ledger
from entrenar.train import OptimConfig, Optimizer, build_optimizer
from entrenar.train.step import forward_backward

_STEPS = 2


@dataclass(frozen=True)
class Scene:
    """A step to rehearse: a model without bytes, its loss, and the batches of the step.

    Attributes:
        mapped: weights in a mapped file, which take no room on the heap.
        streamed_bytes: the part of these that comes and goes; the ledger notes it when it does.
        ranks: how many processes add up their gradients; more than one sum in float32.
    """

    module: nn.Module
    loss: Callable[[Any], Tensor]
    batches: Sequence[Any]
    optim: OptimConfig
    precision: Literal["float32", "bfloat16"]
    mapped: Sequence[Tensor] = ()
    streamed_bytes: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Rehearsal:
    """The memory and arithmetic of a rehearsed step.

    Attributes:
        peak_bytes: by use, at the moment of the peak.
        heap_bytes: the memory that the allocator covered; None where the allocator cannot be asked.
        held_bytes: what the process held at the end apart from these tensors: modules, graph, small objects.
        mapped_bytes: weights in mapped files that stay all the time; part of `peak_bytes`, not of `heap_bytes`.
        state_bytes: the optimizer's state in a checkpoint.
        trained_bytes: the trained weights in a checkpoint.
        trained_tensors: whose gradients several ranks add up.
        flops, moved_bytes: of one step, the matrix products and the bytes that other operations read and wrote.
    """

    peak_bytes: Mapping[str, int]
    heap_bytes: int | None
    held_bytes: int
    mapped_bytes: int
    state_bytes: int
    trained_bytes: int
    trained_parameters: int
    trained_tensors: int
    flops: int
    moved_bytes: int


def rehearse(build: Callable[[Ledger], Scene], returned_from: int | None = None) -> Rehearsal:
    """Build the scene under a ledger and take its step twice; see `Heap` for `returned_from`."""
    heap = Heap(returned_from)
    ledger = Ledger(heap)
    with ledger:
        scene = build(ledger)
        ledger.mark(scene.module.parameters(), "weights")
        ledger.mark(scene.module.buffers(), "weights")
        first = ledger.count
        optimizer = build_optimizer(scene.module.named_parameters(), scene.optim, scene.precision)
        ledger.mark_alive("optimizer", since=first)
        ledger.mark(scene.module.parameters(), "weights")
        for _ in range(_STEPS):
            flops, moved = ledger.flops, ledger.moved_bytes
            moved_besides = take_step(scene, optimizer, ledger)
    held = status_bytes("VmRSS") - heap.resident_bytes - heap.own_bytes - ledger.own_bytes
    state = optimizer.state_dict().values()
    peak = ledger.peak()
    peak["weights"] -= scene.streamed_bytes
    trained = [p for p in scene.module.parameters() if p.requires_grad]
    return Rehearsal(
        peak_bytes={kind: size for kind, size in peak.items() if size},
        heap_bytes=heap.covered_bytes if heap.is_there else None,
        held_bytes=held,
        mapped_bytes=sum(t.nbytes for t in scene.mapped) - scene.streamed_bytes,
        state_bytes=sum(t.nbytes for t in state),
        trained_bytes=sum(p.nbytes for p in trained),
        trained_parameters=sum(p.numel() for p in trained),
        trained_tensors=len(trained),
        flops=ledger.flops - flops,
        moved_bytes=ledger.moved_bytes - moved + moved_besides,
    )


def take_step(scene: Scene, optimizer: Optimizer, ledger: Ledger) -> int:
    """Take one step as the training loop does; return the bytes that the left-out parameters would have moved."""
    first = ledger.count
    optimizer.gradients.begin(len(scene.batches) * scene.ranks)
    forward_backward(scene.batches, scene.loss, ledger.phase)
    trained = [p for p in scene.module.parameters() if p.requires_grad]
    ledger.mark((p.grad for p in trained if p.grad is not None), "gradients")
    ledger.mark_alive("gradients", since=first)
    optimizer.gradient_norm()
    held = _keep_one_of_each(trained)
    moved = ledger.moved_bytes
    with ledger.phase("optimizer"):
        optimizer.step(1e-3, 1.0)
    kept = sum(p.numel() for p in trained) - sum(grad.numel() for grad in held)
    return (ledger.moved_bytes - moved) * sum(grad.numel() for grad in held) // kept


def _keep_one_of_each(trained: Sequence[nn.Parameter]) -> list[Tensor]:
    """Remove the gradients of all parameters but one of each shape and dtype; return them, to keep them alive."""
    seen, held = set(), []
    for parameter in trained:
        key = parameter.shape, parameter.dtype
        if key in seen and parameter.grad is not None:
            held.append(parameter.grad)
            parameter.grad = None
        seen.add(key)
    return held

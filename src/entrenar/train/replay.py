"""Everything that is needed to take a step again whose alarm stopped the run: the bundle, and the step.

The step before is a checkpoint, saved on the way out; the bundle names it, the place in the data, and what was found:
loss, gradient norms, and a hash of each batch. If a replay gives the same bits, the cause is in the data or in the
arithmetic, and can be looked into at leisure. If it does not, the machine is suspect, or something has changed since.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from opentelemetry import trace
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.files import read_json, write_json
from entrenar.train.progress import StepFigures

_FORMAT, _VERSION = "entrenar-replay", 1


@dataclass(frozen=True)
class Bundle:
    """A step whose alarm stopped the run.

    Attributes:
        alarm: the alarm in words.
        checkpoint: the checkpoint after the step before, below the run's folder; None before the first step.
        before, after: the place in the data.
        batches: a hash of each batch of this rank.
        figures: what was found, by name: loss, grad_norm, and the norm of each layer, not rounded.
        monitor: the windows that the step was judged by.
        machine: what the bits of a result may depend on.
        trace_id: the trace of the run, if one was recorded.
    """

    step: int
    alarm: str
    checkpoint: str | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    batches: tuple[str, ...]
    figures: Mapping[str, float]
    monitor: Mapping[str, Any]
    machine: Mapping[str, Any]
    trace_id: str | None

    def write(self, path: Path) -> None:
        """Write the bundle as JSON; numbers in hexadecimal, which keeps every bit, and NaN.

        Raises: DiskFullError, MachineError.
        """
        path.parent.mkdir(exist_ok=True)
        figures = {name: value.hex() for name, value in self.figures.items()}
        write_json(path, {"format": _FORMAT, "version": _VERSION, **asdict(self), "figures": figures})

    @staticmethod
    def read(path: Path) -> "Bundle":
        """Read a bundle.

        Raises: FormatError for a file that is none; OSError.
        """
        content = read_json(path)
        names = [field.name for field in dataclasses.fields(Bundle)]
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            raise FormatError(f"{path} is not a bundle of a step, version {_VERSION}; they are in RUN/replay")
        try:
            figures = {name: float.fromhex(value) for name, value in content["figures"].items()}
            known = {name: content[name] for name in names}
            return Bundle(**{**known, "batches": tuple(content["batches"]), "figures": figures})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: {error!r}") from error


def figures_by_name(figures: StepFigures) -> dict[str, float]:
    """Return the figures of a step that a replay compares."""
    layers = {f"gradient norm of {layer}": norm for layer, norm in figures.layer_norms.items()}
    return {"loss": figures.loss, "gradient norm": figures.grad_norm, **layers}


def differing(recorded: Mapping[str, float], now: Mapping[str, float]) -> Iterator[str]:
    """Yield the names of figures whose bits differ; NaN equals NaN."""
    for name in {**recorded, **now}:
        one, other = recorded.get(name), now.get(name)
        is_same = one is not None and other is not None and (one == other or (math.isnan(one) and math.isnan(other)))
        if not is_same:
            yield name


def batch_hashes(batches: Iterable[Any]) -> tuple[str, ...]:
    """Return the SHA-256 of each batch: of its tensors and all other fields."""
    return tuple(_hash(batch) for batch in batches)


def _hash(batch: Any) -> str:
    digest = hashlib.sha256()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{field.name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{field.name} {value!r}".encode())
    return digest.hexdigest()


def machine(ranks: int) -> dict[str, Any]:
    """Return what the bits of a result may depend on."""
    return {
        "ranks": ranks,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }


def current_trace() -> str | None:
    """Return the id of the trace being recorded, in hexadecimal."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None

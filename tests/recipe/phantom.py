"""A device that is not the CPU, on a machine without one: it finds tensors left behind, and counts waits.

    with phantom_device() as seen:
        ...the product's own code, on torch.device("phantom") where it would take cuda...
    assert not seen.mixed

A tensor on it wraps a CPU tensor and says that its device is phantom:0. An operation that mixes it with a CPU tensor of
one or more dimensions, which a GPU would refuse, is noted; so is everything that makes the host wait for an answer.
A copy of a whole tensor to the host is noted apart: saving a checkpoint is made of them.

Writers that take data pointers (safetensors) are handed the wrapped tensor, as they would be handed a copy on the host.
Not followed: views of a parameter's `.data` in another dtype.
"""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "phantom"
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal")
_CARRIES = ("copy_", "_to_copy")


@dataclass
class Seen:
    """What happened on the device.

    Attributes:
        mixed: operations on tensors of both devices, with the shapes of those left on the host.
        waits: times the host waited, by the operation and the last line of the package.
        fetched: whole tensors copied to the host, likewise.
    """

    mixed: list[tuple[str, list[tuple[int, ...]]]] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    fetched: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Forget everything."""
        self.mixed.clear(), self.waits.clear(), self.fetched.clear()


_seen = Seen()


class Phantom(torch.Tensor):
    """A tensor on the device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "Phantom":
        """Wrap a tensor on the CPU."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=f"{NAME}:0", requires_grad=raw.requires_grad,
        )  # fmt: skip
        made.raw = raw
        return made

    def tolist(self) -> Any:
        """Wait, and return the numbers."""
        _seen.waits[_site("tolist")] += 1
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as every device does."""
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the wrapped tensors."""
        return _run(func, args, kwargs or {})


class Event:
    """Stands in for torch.Event: the device has always come to it."""

    def __init__(self, device: torch.device, *, enable_timing: bool = False) -> None:
        """Demand what a GPU demands of an event whose time is asked for."""
        assert enable_timing
        assert torch.device(device).type == NAME

    def record(self) -> None:
        """Remember the moment."""
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        """Say that the device has come here."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds."""
        return 1e3 * (end.at_s - self.at_s)


def _site(operation: str) -> str:
    lines = [frame for frame in traceback.extract_stack() if "/src/entrenar/" in frame.filename]
    return f"{operation} {Path(lines[-1].filename).name}:{lines[-1].name}" if lines else operation


def _fetched(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    _seen.fetched[_site("save")] += sum(isinstance(tensor, Phantom) for tensor in tensors.values())
    return {name: getattr(tensor, "raw", tensor) for name, tensor in tensors.items()}


def _is_phantom(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = str(func), kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, Phantom)]
    left = [x for x in tensors if not isinstance(x, Phantom) and x.dim() > 0]
    to_host = device is not None and not _is_phantom(device)
    if here and left and not any(word in name for word in _CARRIES):
        _seen.mixed.append((name, [tuple(x.shape) for x in left]))
    if here and any(word in name for word in _WAITS):
        _seen.waits[_site(name)] += 1
    if here and ((to_host and "_to_copy" in name) or ("copy_" in name and not isinstance(args[0], Phantom))):
        _seen.fetched[_site(name)] += 1
    into = args[0] if "copy_" in name else None
    args, kwargs = tree_map(lambda x: x.raw if isinstance(x, Phantom) else x, (args, dict(kwargs)))
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    out = func(*args, **kwargs)
    if "_local_scalar_dense" in name or not (_is_phantom(device) or (here and not to_host)):
        return out
    if into is not None and not isinstance(into, Phantom):
        return out
    return tree_map(lambda x: Phantom(x) if isinstance(x, torch.Tensor) and not isinstance(x, Phantom) else x, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """torch.tensor and as_tensor build on the device below the dispatcher; here they build on the CPU and move."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_phantom(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Phantom):  # type: ignore[attr-defined]
            args[0].raw = args[1].raw
        return func(*args, **kwargs)


@contextlib.contextmanager
def phantom_device() -> Iterator[Seen]:
    """Register the device if need be, and follow all operations."""
    with contextlib.suppress(RuntimeError):
        _setup_privateuseone_for_python_backend(NAME)
    _seen.clear()
    synchronize, event, flatten = torch.accelerator.synchronize, torch.Event, safetensors.torch._flatten_as_ptr
    torch.accelerator.synchronize = lambda *_: _seen.waits.update([_site("synchronize")])
    torch.Event = Event  # type: ignore[misc, assignment]
    safetensors.torch._flatten_as_ptr = lambda tensors, *rest: flatten(_fetched(tensors), *rest)
    try:
        with _Factories(), _Dispatch():
            yield _seen
    finally:
        torch.accelerator.synchronize, torch.Event = synchronize, event  # type: ignore[misc]
        safetensors.torch._flatten_as_ptr = flatten

"""Move activations out of memory between forward and backward: to disk, on a CPU too, or from a GPU to host memory.

Autograd's tape keeps an activation from the moment it is computed until the backward needs it, which for the first
layers is the whole step. Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) take each large one away:
one thread writes behind the forward, another reads ahead of the backward, which goes in reverse order. Weights are on
the tape too, and stay where they are. A tensor saved by several operations is stored once. As everywhere in torch,
saved tensors must not be written to.

The file has no name: it is unlinked as soon as it is created, so no crash leaves it behind. Written pages belong to the
kernel's page cache, which gives them up when memory is needed; they are not the process's memory.

With `full` checkpointing only the inputs of the blocks are left to move.
"""

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from entrenar.errors import ConfigError, DiskFullError, MachineError
from entrenar.files import explained_disk_errors
from entrenar.train.settings import TrainConfig

# Smaller ones would cost a request each and save almost nothing.
LEAST_BYTES = 1 << 18
# How much may wait to be written, and how much is read ahead: a few activations of a large layer.
BEHIND_BYTES = 1 << 26
_AHEAD_BYTES = 1 << 26
_GROWTH_BYTES = 1 << 28


@dataclass(eq=False)
class _Stored:
    """One storage that was moved away, its place in the file, and the part in memory now.

    Attributes:
        number: its place in the order of the forward.
        source: the storage itself until it is written; its copy, if it moves to host memory.
        loaded: the storage read back, until the last of `uses` is done with it.
    """

    number: int
    size: int
    offset: int
    device: torch.device
    source: torch.UntypedStorage | None
    written: "Future[None] | None" = None
    reading: "Future[torch.UntypedStorage] | None" = None
    loaded: torch.UntypedStorage | None = None
    uses: int = 0


@dataclass(eq=False)
class _Saved:
    """The stand-in for a tensor on the tape: which part of which storage it was."""

    stored: _Stored
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int


class ActivationFile:
    """A file without a name that grows to `budget_bytes` at most; space is allocated before it is written."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget_bytes, self._allocated = folder, budget_bytes, 0
        with explained_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed in `close`

    def reserve(self, end: int) -> None:
        """Allocate space for `end` bytes.

        Raises: DiskFullError beyond the budget or the free space; MachineError.
        """
        if end > self._budget_bytes:
            raise DiskFullError(
                f"activations must fit offload_budget_gb = {self._budget_bytes / 1e9:g}, a batch has more than "
                f"{end / 1e9:.3g} GB of them; raise it, set checkpointing = full, or train on smaller batches"
            )
        if end > self._allocated:
            grown = min(max(end, self._allocated + _GROWTH_BYTES), self._budget_bytes)
            with explained_disk_errors(self._folder):
                os.posix_fallocate(self._file.fileno(), 0, grown)
            self._allocated = grown

    def write(self, storage: torch.UntypedStorage, offset: int) -> None:
        """Write a storage to its place.

        Raises: DiskFullError, MachineError.
        """
        view, done = _bytes_of(storage), 0
        with explained_disk_errors(self._folder):
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)

    def read(self, offset: int, size: int) -> torch.UntypedStorage:
        """Read a storage from its place.

        Raises: MachineError when the file has lost it.
        """
        storage = torch.empty(size, dtype=torch.uint8).untyped_storage()
        view, done = _bytes_of(storage), 0
        while done < size:
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not count:
                raise MachineError(f"the file of activations in {self._folder} ends at byte {offset + done}")
            done += count
        return storage

    def close(self) -> None:
        """Close the file; this deletes it."""
        self._file.close()


class ActivationStore:
    """Moves activations to a file, or without one to host memory, and brings them back.

    Used as `loss = store.around(loss)`; the module's own parameters and buffers stay where they are.

    Attributes:
        most_bytes: the most bytes away at once.
    """

    def __init__(self, module: nn.Module, file: ActivationFile | None) -> None:
        self._module, self._file = module, file
        self._writer, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._live: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._order: list[weakref.ref[_Stored]] = []
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[_Stored]]] = {}
        self._behind: deque[_Stored] = deque()
        self._kept: set[int] = set()
        self._end = self.most_bytes = 0

    def around(self, loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Return a loss whose tape holds no large activation.

        Raises, when it is called: DiskFullError, MachineError.
        """

        def offloaded(batch: Any) -> Tensor:
            self._begin()
            with saved_tensors_hooks(self._pack, self._unpack):
                return loss(batch)

        return offloaded

    def close(self) -> None:
        """Wait for the threads and close the file."""
        self._writer.shutdown()
        self._reader.shutdown()
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        own = chain(self._module.parameters(), self._module.buffers())
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._known.clear()
        if not self._live:  # every tape of earlier forwards is gone, so their space is free
            self._order.clear()
            self._end = 0

    # ---- forward ----

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        is_part = tensor.numel() * tensor.element_size() < storage.nbytes()
        if storage.nbytes() < LEAST_BYTES or is_part or storage.data_ptr() in self._kept:
            return tensor
        stored = self._stored(storage)
        stored.uses += 1
        saved = _Saved(stored, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        self._live.add(saved)
        return saved

    def _stored(self, storage: torch.UntypedStorage) -> _Stored:
        """Return the record of a storage, and move it away if it is new."""
        address = storage._cdata
        if address in self._known:
            original, reference = self._known[address]
            known = reference()
            if known is not None and not original.expired():  # type: ignore[no-untyped-call]
                return known
        stored = _Stored(len(self._order), storage.nbytes(), self._end, storage.device, source=storage)
        self._end += stored.size
        self.most_bytes = max(self.most_bytes, self._end)
        if self._file is None or storage.device.type != "cpu":
            stored.source = _to_host(storage)
        if self._file is not None:
            self._file.reserve(self._end)
            self._write_behind(stored, self._file)
        self._known[address] = _weak(storage), weakref.ref(stored)
        self._order.append(weakref.ref(stored))
        return stored

    def _write_behind(self, stored: _Stored, file: ActivationFile) -> None:
        stored.written = self._writer.submit(_write, stored, file)
        self._behind.append(stored)
        while sum(one.size for one in self._behind) > BEHIND_BYTES:
            written = self._behind.popleft().written
            if written is not None:
                written.result()

    # ---- backward ----

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        stored = saved.stored
        storage = self._loaded(stored)
        stored.uses -= 1
        stored.loaded = storage if stored.uses > 0 else None
        self._read_ahead(stored.number)
        tensor = torch.empty(0, dtype=saved.dtype, device=storage.device)
        return tensor.set_(storage, saved.storage_offset, saved.shape, saved.stride)

    def _loaded(self, stored: _Stored) -> torch.UntypedStorage:
        if stored.loaded is not None:
            return stored.loaded
        storage = stored.source
        if storage is None:
            reading = stored.reading or self._read(stored)
            storage, stored.reading = reading.result(), None
        return storage if stored.device.type == "cpu" else storage.to(device=stored.device)

    def _read_ahead(self, number: int) -> None:
        ahead = 0
        for reference in reversed(self._order[:number]):
            stored = reference()
            if stored is None or stored.source is not None or stored.loaded is not None:
                continue
            ahead += stored.size
            if ahead > _AHEAD_BYTES:
                return
            if stored.reading is None and stored.uses > 0:
                stored.reading = self._read(stored)

    def _read(self, stored: _Stored) -> "Future[torch.UntypedStorage]":
        file = cast(ActivationFile, self._file)  # without a file every source stays
        return self._reader.submit(file.read, stored.offset, stored.size)


def _write(stored: _Stored, file: ActivationFile) -> None:
    if stored.source is not None:
        file.write(stored.source, stored.offset)
        stored.source = None


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    view = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return view.numpy().data


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=source.is_cuda)
    return copy.copy_(source).untyped_storage()


def open_store(module: nn.Module, config: TrainConfig, run_dir: Path) -> ActivationStore | None:
    """Return the store that `config` asks for; None when activations stay where they are.

    Raises: ConfigError when the machine or another setting rules it out; DiskFullError, MachineError.
    """
    if config.offload == "none":
        return None
    if config.compile:
        raise ConfigError("train.offload and train.compile cannot be combined; leave one out")
    if config.offload == "disk":
        file = ActivationFile(config.offload_dir or run_dir, int(config.offload_budget_gb * 1e9))
        return ActivationStore(module, file)
    if next(module.parameters()).device.type == "cpu":
        raise ConfigError(
            "train.offload = host needs a GPU: a CPU's activations are in host memory already; set it to disk"
        )
    return ActivationStore(module, None)

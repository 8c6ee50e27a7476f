"""Write checkpoints in the background, without a copy of the model.

Weights and moments change only in the optimizer's step. So a thread can read them live while the next step's forward
and backward run; the loop waits for it just before the optimizer moves (`wait_staged`), and not at all for hashing,
fsync and rename. No snapshot is allocated, which matters where memory limits the model; the idea is torchtitan's
"wait for staging before the next mutation".
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from entrenar.errors import MachineError
from entrenar.runs import checkpoint_name
from entrenar.train import checkpoint
from entrenar.train.joint import JointWriter
from entrenar.train.oom import explained_oom

_RESERVE_BYTES = 4 << 20


class Saver:
    """Writes one checkpoint at a time into `folder`, by a `joint` writer with the other ranks if there is one.

    Attributes:
        seconds: how long the last one took, None before it.
    """

    def __init__(
        self,
        folder: Path,
        write_model: Callable[[Path, Mapping[str, Tensor]], None],
        *,
        before_commit: Callable[[], None],
        joint: JointWriter | None = None,
    ) -> None:
        self._folder, self._joint = folder, joint
        self._write_model = write_model
        self._before_commit = before_commit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Allocated now and released for the write: when memory is short later, the last checkpoint must not fail for a
        # thread's stack, nor for safetensors' buffer of 1 MiB, without which its Rust code aborts the process.
        self._reserve = self._thread.submit(bytearray, _RESERVE_BYTES).result()
        self._writing: Future[None] | None = None
        self._tidying: list[Future[None]] = []
        self._step = 0
        self.seconds: float | None = None
        self._staged = threading.Event()
        self._staged.set()

    def start(self, snapshot: checkpoint.Snapshot) -> None:
        """Start writing `snapshot`; the result of the previous one must have been taken."""
        self._start(snapshot, self._folder)

    def start_apart(self, snapshot: checkpoint.Snapshot, folder: Path) -> None:
        """Start writing `snapshot` into another folder than the checkpoints'."""
        self._start(snapshot, folder)

    def _start(self, snapshot: checkpoint.Snapshot, folder: Path) -> None:
        self._step = snapshot.step
        self._staged.clear()
        self._writing = self._thread.submit(self._write, snapshot, folder)

    def tidy(self, work: Callable[[], None]) -> None:
        """Do `work` in the thread, after the checkpoint being written."""
        self._tidying.append(self._thread.submit(work))

    def take_tidied(self) -> MachineError | None:
        """Return why a `tidy` failed that has ended since the last call; None if none did.

        Raises: any error other than a MachineError.
        """
        while self._tidying and self._tidying[0].done():
            try:
                self._tidying.pop(0).result()
            except MachineError as error:
                return error
        return None

    def _write(self, snapshot: checkpoint.Snapshot, folder: Path) -> None:
        self._reserve = bytearray()
        started = time.perf_counter()
        try:
            with explained_oom("writing a checkpoint"):
                path, staged = folder / checkpoint_name(snapshot.step), self._staged.set
                if self._joint is not None:
                    self._joint.write(path, snapshot, staged)
                else:
                    commit = self._before_commit
                    checkpoint.write(path, snapshot, self._write_model, staged=staged, before_commit=commit)
            self.seconds = time.perf_counter() - started
        finally:
            self._staged.set()
        with suppress(MemoryError):
            self._reserve = bytearray(_RESERVE_BYTES)

    def wait_staged(self) -> None:
        """Return when the live tensors may change again."""
        self._staged.wait()

    def take(self, *, wait: bool) -> tuple[int, MachineError | None] | None:
        """Return step and outcome of the checkpoint written since the last call; None if there is none.

        Raises: any error other than a MachineError, such as a bug in the model writer.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except MachineError as error:
            return self._step, error
        return self._step, None

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(wait=True)

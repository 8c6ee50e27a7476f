"""A checkpoint that several ranks write together: every byte once, by one of them, into files that anyone can read.

Each file holds whole tensors. The tensors are dealt out in rounds; in a round each rank gathers those of one file, then
all write at the same time. So a model is a plain Hugging Face folder from the start, with an index and no step that
puts it together, and a run resumes on any number of ranks. torch.distributed.checkpoint's own writer stores slices,
which other programs read only after one process has written everything once more.

    writer                                   every other rank
    make the folder, tell its name      ->   gather, write and hash own files
    gather, write and hash own files
    manifest, rename                    <-   tell hashes, or what failed
    tell how it went                    ->   take it as the outcome

It runs in a thread of each rank, over connections of its own, while training goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from entrenar.errors import DiskFullError, MachineError
from entrenar.files import atomic_directory, explained_disk_errors, fsync_file, sha256_file, write_json
from entrenar.runs import MODEL_FOLDER
from entrenar.train.checkpoint import Snapshot, facts_of, save_tensors
from entrenar.train.manifest import OPTIMIZER, STATE, write_manifest
from entrenar.train.task import Task
from entrenar.train.world import Pieces

LIMIT_BYTES = 1 << 30
_MODEL = f"{MODEL_FOLDER}/model.safetensors"


@dataclass(frozen=True)
class SharedFile:
    """A file of whole tensors: its place in the checkpoint, what it holds, and the rank that writes it."""

    path: str
    names: Sequence[str]
    rank: int


def deal(path: str, tensors: Mapping[str, Tensor], ranks: int, limit_bytes: int) -> list[list[SharedFile]]:
    """Deal tensors out in rounds of at most one file a rank, of similar sizes and about `limit_bytes` at most.

    A single file has the name `path`; several are numbered as Hugging Face does.
    """
    rounds: list[list[list[str]]] = []
    loads: list[int] = []
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()  # in pieces too, this is the whole
        if not rounds or (min(loads) > 0 and min(loads) + size > limit_bytes):
            rounds.append([[] for _ in range(ranks)])
            loads = [0] * ranks
        rank = loads.index(min(loads))
        rounds[-1][rank].append(name)
        loads[rank] += size
    count = sum(bool(names) for each in rounds for names in each)
    stem, number, dealt = path.removesuffix(".safetensors"), 0, []
    for each in rounds:
        files = []
        for rank, names in enumerate(each):
            if names:
                number += 1
                numbered = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
                files.append(SharedFile(path if count == 1 else numbered, names, rank))
        dealt.append(files)
    return dealt


@dataclass(frozen=True)
class JointWriter:
    """Writes the checkpoints of a task whose weights are in pieces; every rank has one.

    Attributes:
        before_commit: called on the writer just before a checkpoint's rename.
        limit_bytes: about the most that a file holds.
    """

    task: Task[Any]
    pieces: Pieces
    before_commit: Callable[[], None]
    limit_bytes: int = LIMIT_BYTES

    def write(self, path: Path, snapshot: Snapshot, staged: Callable[[], None]) -> None:
        """Write `snapshot` to the folder `path`; every rank calls it, and `staged` is as `checkpoint.write` has it.

        Raises: DiskFullError, MachineError, on every rank; the folder then does not exist.
        """
        part = _Part(self, snapshot, staged)
        if not self.pieces.apart.is_writer:
            part.write(Path(self._hear()))
            self._hear()
            return
        has_begun = False
        try:
            with atomic_directory(path) as folder:
                has_begun = True
                self._tell(str(folder))
                write_manifest(folder, facts_of(snapshot), part.write(folder))
                self.before_commit()
        except Exception as error:
            if part.is_told or not has_begun:  # else the others know of it already
                self._tell(error=error)
            raise
        self._tell()

    def _tell(self, content: str = "", error: Exception | None = None) -> None:
        self.pieces.apart.broadcast({"content": content, **_described(error)})

    def _hear(self) -> str:
        """Return what the writer tells.

        Raises: DiskFullError, MachineError if that is what it tells.
        """
        message: dict[str, Any] = self.pieces.apart.broadcast({})
        _raise_if_failed([message])
        return str(message["content"])


def _described(error: Exception | None) -> dict[str, Any]:
    return {"error": None if error is None else str(error), "is_full": isinstance(error, DiskFullError)}


def _raise_if_failed(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        if message["error"] is not None:
            raise (DiskFullError if message["is_full"] else MachineError)(message["error"])


class _Part:
    """What one rank does for one checkpoint; `is_told` once all ranks know that the files of all are there."""

    def __init__(self, writer: JointWriter, snapshot: Snapshot, staged: Callable[[], None]) -> None:
        self._task, self._pieces, self._limit = writer.task, writer.pieces, writer.limit_bytes
        self._snapshot, self._staged = snapshot, staged
        self._error: MachineError | None = None
        self.is_told = False

    def write(self, folder: Path) -> dict[str, Any]:
        """Write this rank's files; return the manifest's entries for those of all ranks.

        Raises: DiskFullError, MachineError if any rank could not write its own.
        """
        try:
            own = self._write_files(folder)
        finally:
            self._staged()
        entries = {}
        for name in own if self._error is None else ():
            entries[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        messages = self._pieces.apart.gather({"entries": entries, **_described(self._error)})
        _raise_if_failed(messages)
        self.is_told = True
        return {name: entry for message in messages for name, entry in message["entries"].items()}

    def _write_files(self, folder: Path) -> list[str]:
        weights, moments = self._snapshot.weights, self._snapshot.optimizer
        ranks, write_index, model = self._pieces.writers, self._task.write_index, folder / MODEL_FOLDER
        self._try(model, lambda: model.mkdir(exist_ok=True))
        of_model = deal(_MODEL, weights, ranks, self._limit) if write_index else []
        given = {} if write_index else self._gather(weights, SharedFile("", [*weights], 0))
        own = self._gather_and_write(folder, weights, of_model)
        own += self._gather_and_write(folder, moments, deal(OPTIMIZER, moments, ranks, self._limit))
        self._staged()
        if self._pieces.apart.is_writer:
            places = {name: Path(file.path).name for each in of_model for file in each for name in file.names}
            if write_index:
                self._try(model, lambda: write_index(model, weights, places))
            else:
                self._try(model, lambda: self._task.write_model(model, given))
            self._try(folder, lambda: write_json(folder / STATE, self._snapshot.state))
        return own

    def _gather_and_write(
        self, folder: Path, tensors: Mapping[str, Tensor], rounds: Sequence[Sequence[SharedFile]]
    ) -> list[str]:
        """Take part in every round, also after a failure: the others wait for this rank's pieces."""
        written = []
        for each in rounds:
            gathered = [(file, self._gather(tensors, file)) for file in each]
            for file, own in gathered:
                if own:
                    self._try(folder / file.path, partial(_save_durably, folder / file.path, own))
                    written.append(file.path)
        return written

    def _gather(self, tensors: Mapping[str, Tensor], file: SharedFile) -> dict[str, Tensor]:
        """Return the tensors of a file on the rank that writes it, nothing on the others."""
        whole = {name: self._pieces.whole(tensors[name], file.rank) for name in file.names}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    def _try(self, path: Path, action: Callable[[], object]) -> None:
        if self._error is None:
            try:
                with explained_disk_errors(path):
                    action()
            except MachineError as error:
                self._error = error


def _save_durably(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(path, tensors)
    fsync_file(path)

"""Rows of bytes for each document, on disk, found by the hash of its tokens.

    trunk.json     what the rows belong to; anything else is another cache
    rows.bin       the documents' rows one after the other, only ever appended to
    index.jsonl    a line for each document: hash, first row, number of rows, CRC-32 of the bytes

Rows are written before the line that names them, and each read is checked against the CRC, so a run that is killed at
any instant leaves at worst rows that no line names. Nothing here is worth failing for: what is damaged or belongs to
something else is dropped, said aloud and made again. Only one process holds a cache at a time.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from entrenar.errors import ConfigError, DiskFullError, FormatError
from entrenar.files import atomic_write, explained_disk_errors, read_json, write_json

KEY_FILE, ROWS_FILE, INDEX_FILE, LOCK_FILE = "trunk.json", "rows.bin", "index.jsonl", "lock"


@dataclass(frozen=True)
class Place:
    """Where a document's rows lie."""

    start: int
    length: int
    crc32: int


class TrunkStore:
    """An open cache folder.

    Raises:
        ConfigError: another process has it open.
        DiskFullError, MachineError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, str], row_bytes: int, budget_bytes: int, on_event: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.row_bytes = row_bytes
        self.budget_bytes = budget_bytes
        self._on_event = on_event
        self._places: dict[str, Place] = {}
        self._is_full = False
        self._is_damage_told = False
        with explained_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"trunk cache {folder} is in use by another run; give this one another folder") from error
        if not self._is_ours(key):
            for name in (ROWS_FILE, INDEX_FILE):
                (folder / name).unlink(missing_ok=True)
            write_json(folder / KEY_FILE, dict(key))
        with explained_disk_errors(folder):
            self._rows = (folder / ROWS_FILE).open("a+b", buffering=0)
            self._read_index()
            self._index = (folder / INDEX_FILE).open("ab", buffering=0)

    def __len__(self) -> int:
        """Return the number of documents held."""
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows on disk."""
        return os.fstat(self._rows.fileno()).st_size

    def close(self) -> None:
        """Let go of the folder."""
        for stream in (self._rows, self._index, self._lock):
            stream.close()

    def read(self, document: str, length: int) -> UInt8[Tensor, "T bytes"] | None:
        """Return a document's rows; None if they are missing or damaged."""
        place = self._places.get(document)
        if place is None:
            return None
        rows = torch.empty(length, self.row_bytes, dtype=torch.uint8)
        view = rows.numpy().data.cast("B")
        count = os.preadv(self._rows.fileno(), [view], place.start * self.row_bytes)
        if place.length == length and count == len(view) and zlib.crc32(view) == place.crc32:
            return rows
        del self._places[document]
        if not self._is_damage_told:
            self._is_damage_told = True
            self._on_event(f"trunk cache {self.folder}: rows of documents are damaged; they are computed again")
        return None

    def write(self, document: str, rows: UInt8[Tensor, "T bytes"]) -> None:
        """Keep a document's rows if they fit into the budget and onto the disk."""
        if self._is_full or document in self._places:
            return
        view = rows.contiguous().numpy().data.cast("B")
        size_bytes = self.size_bytes
        if size_bytes + len(view) > self.budget_bytes:
            self._stop_writing(f"its budget of {self.budget_bytes:,} bytes is spent")
            return
        # A torn write of an earlier run may have left part of a row.
        start = -(-size_bytes // self.row_bytes)
        place = Place(start, len(rows), zlib.crc32(view))
        try:
            with explained_disk_errors(self.folder):
                os.truncate(self._rows.fileno(), start * self.row_bytes)
                while view:
                    view = view[os.write(self._rows.fileno(), view) :]
                self._index.write(_line(document, place))
        except DiskFullError:
            self._stop_writing("the disk is full")
            return
        self._places[document] = place

    def _stop_writing(self, reason: str) -> None:
        self._is_full = True
        self._on_event(
            f"trunk cache {self.folder}: {reason} after {len(self)} documents; the others are computed in every epoch"
        )

    def _is_ours(self, key: Mapping[str, str]) -> bool:
        path = self.folder / KEY_FILE
        if not path.is_file():
            return False
        try:
            held = read_json(path)
        except FormatError as error:
            self._on_event(f"trunk cache {self.folder} is damaged and is rebuilt: {error}")
            return False
        if held == dict(key):
            return True
        held = held if isinstance(held, dict) else {}
        names = sorted(name for name in held.keys() | key.keys() if held.get(name) != key.get(name))
        self._on_event(f"trunk cache {self.folder} is rebuilt: it was made for another {', '.join(names)}")
        return False

    def _read_index(self) -> None:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return
        rows_held = self.size_bytes // self.row_bytes
        damaged = 0
        for line in path.read_bytes().split(b"\n"):
            if not line:
                continue
            try:
                entry = json.loads(line)
                place = Place(int(entry["start"]), int(entry["length"]), int(entry["crc32"]))
                document = str(entry["document"])
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            if not 0 <= place.start <= place.start + place.length <= rows_held:
                damaged += 1
                continue
            self._places[document] = place
        if damaged:
            atomic_write(path, b"".join(_line(document, place) for document, place in self._places.items()))
            self._on_event(
                f"trunk cache {self.folder}: {damaged} of its documents are damaged; they are computed again"
            )


def _line(document: str, place: Place) -> bytes:
    return json.dumps({"document": document, **asdict(place)}).encode() + b"\n"

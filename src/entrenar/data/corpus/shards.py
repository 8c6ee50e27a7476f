"""Write the ids of a split into shard files of bounded size."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data.corpus.corpus import ShardEntry, SplitEntry


@dataclass
class Counts:
    """The contents of a split; `bytes` is the UTF-8 length of its documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class ShardWriter:
    """Writes the ids of one split into shards of bounded size, hashing as it goes."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._stream: Any = None
        self._digest = hashlib.sha256()
        self._filled = 0
        self.shards: list[ShardEntry] = []
        self.counts = Counts()

    def write(self, ids: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Append `ids`."""
        self.counts.tokens += len(ids)
        while len(ids):
            if self._stream is None:
                self._stream = (self._folder / self._name()).open("wb")
            part = ids[: self._shard_tokens - self._filled]
            data = part.tobytes()
            self._stream.write(data)
            self._digest.update(data)
            self._filled += len(part)
            ids = ids[len(part) :]
            if self._filled == self._shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the current shard."""
        if self._stream is None:
            return
        self._stream.close()
        self.shards.append(ShardEntry(file=self._name(), tokens=self._filled, sha256=self._digest.hexdigest()))
        self._stream, self._digest, self._filled = None, hashlib.sha256(), 0

    def entry(self) -> SplitEntry:
        """Return the manifest's entry of the closed split."""
        counts = self.counts
        return SplitEntry(documents=counts.documents, tokens=counts.tokens, bytes=counts.bytes, shards=self.shards)

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}.bin"

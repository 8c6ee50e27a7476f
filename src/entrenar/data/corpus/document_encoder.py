"""Encode documents of a corpus in batches, on as many threads as there are: BOS, tokens and EOS in one array."""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entrenar.data.corpus.corpus import Split
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads_of_tokenizers(threads: int) -> Iterator[None]:
    """Keep `tokenizers` to one thread a call while ours call it, or while one is wanted.

    Its pool cannot be resized once started, and used in a process that forks later it warns; the variable is its only
    switch.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if threads == 1:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@dataclass
class Texts:
    """Documents of one split that are encoded together."""

    split: Split
    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    total_bytes: int = 0


class DocumentEncoder:
    """Encodes a batch into one array: BOS, tokens, EOS for each document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        boundary = bos if bos is not None else eos
        if boundary is None:
            raise DataError(
                "the tokenizer has neither a BOS nor an EOS token, so documents could not be told apart; "
                "name one in its tokenizer_config.json (bos_token, eos_token)"
            )
        self.bos_id, self.eos_id = boundary, eos if eos is not None else boundary
        self.tokenizer = tokenizer
        self.dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        table = [0 if index in tokenizer.special_ids else len(data) for index, data in enumerate(tokenizer.token_bytes)]
        self.token_bytes = np.array(table, dtype="<u4")

    def __call__(self, batch: Texts) -> tuple[np.ndarray[Any, np.dtype[Any]], int]:
        """Return the ids, and how many documents they do not spell exactly."""
        # An array of C integers fills three times as fast from a list as a numpy array does.
        ids = array("I")
        starts: list[int] = []
        for encoded in self.tokenizer.encode_batch(batch.texts):
            starts.append(len(ids))
            ids.append(self.bos_id)
            ids.extend(encoded)
            ids.append(self.eos_id)
        stored = np.frombuffer(ids, dtype=np.uintc).astype(self.dtype)
        spelled = np.add.reduceat(self.token_bytes[stored], starts, dtype=np.int64) - int(self.tokenizer.adds_space)
        return stored, int(np.count_nonzero(spelled != batch.sizes))

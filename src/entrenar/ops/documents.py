"""Where the documents of a packed batch lie: spans for the kernels, positions for the rotation.

A batch is packed on the host, so its spans are known there, as plain integers: attention is cut along them without
asking the device, which would have to finish all its work before it could answer. Everything that is needed for each
token follows from the spans by `repeat`, with no loop over tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from entrenar.errors import DataError

Spans = tuple[tuple[int, int], ...]
DocumentSpans = tuple[Spans, ...]
"""For each row, the half-open (start, end) of each document, in order, covering the row."""


def document_spans(ids: Int[Tensor, "B T"]) -> DocumentSpans:
    """Return the half-open span of each run of equal ids in each row; ids on a device are fetched, so it waits.

    Raises:
        DataError: an id is smaller than the one before it.
    """
    rows = ids.cpu().numpy()
    steps = np.diff(rows, axis=1)
    if (steps < 0).any():
        row, place = (int(index) for index in np.argwhere(steps < 0)[0])
        raise DataError(
            f"document ids must not decrease within a row, got {rows[row, place + 1]} after {rows[row, place]} "
            f"at position {place + 1}: number the documents of a row in their order"
        )
    length = rows.shape[1]
    edges = ([0, *(np.flatnonzero(step) + 1).tolist(), length] for step in steps)
    return tuple(tuple(pairwise(row)) if length else () for row in edges)


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a packed batch, on the device of its tokens.

    Attributes:
        spans: for each row, the half-open (start, end) of each document, in order, covering the row.
        positions: the place of each token within its document.
    """

    spans: DocumentSpans
    positions: Int[Tensor, "B T"]

    @staticmethod
    def from_spans(spans: DocumentSpans, device: torch.device | str = "cpu") -> "Documents":
        """Find the position of each token."""
        starts = _for_each_token(spans, lambda edges: edges[:, 0])
        positions = np.arange(starts.shape[1]) - starts
        return Documents(spans, torch.from_numpy(positions).to(device, non_blocking=True))

    @staticmethod
    def from_ids(ids: Int[Tensor, "B T"]) -> "Documents":
        """Find spans and positions from each token's document; documents must not decrease within a row."""
        spans = document_spans(ids)
        return Documents(spans, Documents.from_spans(spans, ids.device).positions.reshape(ids.shape))

    @property
    def ids(self) -> Int[Tensor, "B T"]:
        """The document of each token, numbered within its row."""
        return (self.positions == 0).cumsum(-1) - 1

    @property
    def lengths(self) -> Int[Tensor, "B T"]:
        """The length of each token's document."""
        lengths = _for_each_token(self.spans, lambda edges: edges[:, 1] - edges[:, 0])
        return torch.from_numpy(lengths).to(self.positions.device, non_blocking=True)


def _for_each_token(
    spans: DocumentSpans, value: Callable[[np.ndarray[Any, np.dtype[np.int64]]], np.ndarray[Any, np.dtype[np.int64]]]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return, for each token, what `value` gives of the (start, end) of its document."""
    rows = [np.array(row, dtype=np.int64).reshape(-1, 2) for row in spans]
    length = rows[0][-1, 1] if rows and len(rows[0]) else 0
    parts = [np.repeat(value(edges), edges[:, 1] - edges[:, 0]) for edges in rows]
    return np.array(parts, dtype=np.int64).reshape(len(rows), length)

"""Define the output of the independent readers of model files: rows that are read on demand.

The readers share nothing with the code that loads and writes models. They serve verification only, and are simple: a
source has been loaded by the strict reader before, and a target was written here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entrenar.interop.proof.numpy_llama import Array, Shape, Weights


@dataclass(frozen=True)
class FileRows:
    """A matrix or vector in a file, of which nothing is in memory but the rows that are asked for."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Array]

    def __getitem__(self, index: Any) -> Array:
        """Return the rows of a slice or of an array of numbers."""
        width = math.prod(self.shape[1:])
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self.read(start * width, stop * width).reshape(-1, *self.shape[1:])
        rows = [self.read(row * width, (row + 1) * width) for row in np.asarray(index).reshape(-1).tolist()]
        return np.stack(rows).reshape(*np.shape(index), *self.shape[1:])


@dataclass(frozen=True)
class Readback:
    """An independent reader's output: the weights by Hugging Face's names, in the file's own order of rows.

    Attributes:
        encode: the tokenizer in the file, None where it holds none.
        id_of: the id of a token by its name, where the file has names.
        roles: which tokens begin and end a text, where the file says so.
    """

    names: frozenset[str]
    weight: Weights
    shape: Shape
    encode: Any = None
    id_of: Callable[[str], int | None] | None = None
    roles: Mapping[str, int | None] = field(default_factory=dict)

"""Keys and values of the tokens already read, so that a new token costs one token.

All memory is taken at the start; new tokens never move old entries. Rows of a batch whose prompts differ in length
are padded on the left, so that all rows end, and grow, at the same slot: row b begins at slot `starts[b]`, its
positions count from there, and no query looks before it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entrenar.errors import DataError
from entrenar.model.config import LlamaConfig
from entrenar.ops import DocumentSpans


class KVCache:
    """Keys and values of each layer, filled up to `length`.

    Attributes:
        layers: the keys and the values of each layer, (L, 2, B, G, max_len, K).
        first_slots: the first slot of each row's text, on the host; None where every row begins at slot 0.
        starts: the same on the device, (B,).
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_len: int,
        *,
        starts: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (config.num_layers, 2, batch_size, config.kv_heads, max_len, config.head_width)
        self.layers = torch.empty(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.first_slots = tuple(starts) if starts is not None and any(starts) else None
        self.starts: Int[Tensor, " B"] | None = None
        if self.first_slots is not None:
            self.starts = torch.tensor(self.first_slots, device=device)
        self.length = 0

    def append(
        self, layer: int, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Write the keys and values of T new tokens and return views of those of all S tokens."""
        end = self.end_after(k.shape[2])
        keys, values = self.layers[layer, 0], self.layers[layer, 1]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def end_after(self, num_tokens: int) -> int:
        """Return the length after `num_tokens` more.

        Raises:
            DataError: they do not fit.
        """
        end = self.length + num_tokens
        if end > self.max_len:
            raise DataError(
                f"a key/value cache takes max_len = {self.max_len} tokens, got {self.length} + {num_tokens}; "
                "make it longer"
            )
        return end

    def spans(self, end: int) -> DocumentSpans:
        """Return, for each row, the padding and the text of the slots before `end`, as documents."""
        edges = [(0, min(first, end), end) for first in self.first_slots or ()]
        return tuple(tuple(span for span in pairwise(row) if span[0] < span[1]) for row in edges)

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += num_tokens

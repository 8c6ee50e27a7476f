"""Blocks of rows cover every row once."""

import pytest
import torch

from entrenar.ops.row_blocks import BLOCK_ELEMENTS, row_blocks


@pytest.mark.parametrize("shape", [(0, 4), (1, 3 * BLOCK_ELEMENTS), (5, BLOCK_ELEMENTS // 2), (1000, 700), (7, 0)])
def test_blocks_cover_every_row_once_and_keep_their_size(shape):
    """Joined, the blocks are all rows in order; each holds at most BLOCK_ELEMENTS elements or a single row."""
    rows = torch.empty(shape, device="cpu")
    blocks = row_blocks(rows)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(shape[0]))
    assert all(
        (block.stop - block.start) * shape[1] <= BLOCK_ELEMENTS or block.stop - block.start == 1 for block in blocks
    )


def test_another_device_gets_one_block():
    """Where launches cost and caches do not, the whole tensor is one block."""
    assert row_blocks(torch.empty(10, BLOCK_ELEMENTS, device="meta")) == [slice(0, 10)]

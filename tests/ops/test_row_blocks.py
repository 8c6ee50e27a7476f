"""Blocks of rows cover every row once."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


FITTING = {(1000, 700): BLOCK_ELEMENTS // 700, (BLOCK_ELEMENTS + 1, 1): BLOCK_ELEMENTS,
           (BLOCK_ELEMENTS + 1,): BLOCK_ELEMENTS, (3, 2 * BLOCK_ELEMENTS): 1}  # fmt: skip


@pytest.mark.parametrize(("shape", "rows_in_block"), FITTING.items())
def test_a_block_is_as_many_rows_as_fit(shape, rows_in_block):
    """No block but the last is smaller than it may be."""
    blocks = row_blocks(torch.empty(shape, device="meta"))
    assert {block.stop - block.start for block in blocks[:-1]} == {rows_in_block}


def test_another_device_gets_one_block():
    """Where launches cost and caches do not, the whole tensor is one block."""
    with FakeTensorMode():
        rows = torch.empty(10, BLOCK_ELEMENTS, device="cuda")
    assert row_blocks(rows) == [slice(0, 10)]


def test_a_meta_tensor_stands_for_one_of_the_cpu():
    """A step is planned with the blocks that it will have."""
    rows = torch.empty(10, BLOCK_ELEMENTS, device="meta")
    assert row_blocks(rows) == row_blocks(torch.empty(rows.shape))

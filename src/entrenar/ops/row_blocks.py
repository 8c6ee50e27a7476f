"""Run the elementwise operations block by block on a CPU.

A float32 copy of a large bfloat16 tensor is written to memory and read back by every operator of a formula, and the
allocator returns such copies to the kernel at each free, so each faults in again. A block of rows whose temporaries
fit the second-level cache costs neither. On other devices a block is the whole tensor: there a launch is what costs.
A meta tensor is treated as one on a CPU, whose memory it stands for when a run is planned.
"""

import math

from torch import Tensor

BLOCK_ELEMENTS = 2**18  # 1 MiB in float32; smaller gains nothing and meets the other threads more often


def row_blocks(rows: Tensor) -> list[slice]:
    """Cut the first dimension into consecutive blocks, on a CPU of about `BLOCK_ELEMENTS` elements each."""
    num_rows, row_elements = rows.shape[0], max(1, math.prod(rows.shape[1:]))
    size = max(1, BLOCK_ELEMENTS // row_elements) if rows.device.type in ("cpu", "meta") else max(1, num_rows)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

"""What the allocator is told, it does: freed blocks stay with the process, or go."""

import subprocess
import sys

import pytest

BLOCKS, BLOCK_BYTES = 8, 1 << 24


@pytest.mark.parametrize(("way", "stays"), [("keep_freed_memory", True), ("return_freed_blocks", False)])
def test_freed_blocks_stay_or_go(way: str, *, stays: bool) -> None:
    """Between blocks in use, freed ones stay resident after `keep_freed_memory` and are gone otherwise."""
    script = _FREED.format(path=sys.path, way=way, blocks=BLOCKS, block_bytes=BLOCK_BYTES)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    taken, left = (int(word) for word in done.stdout.split())
    assert taken > (BLOCKS - 1) * BLOCK_BYTES
    assert (left > (BLOCKS - 1) * BLOCK_BYTES) if stays else (left < BLOCK_BYTES)


_FREED = """
import os, sys
sys.path[:] = {path!r}
import torch
from entrenar.train import keep_freed_memory, return_freed_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

assert {way}()
before = resident()
blocks, small = [], []
for _ in range({blocks}):
    blocks.append(torch.ones({block_bytes}, dtype=torch.uint8))
    small.append(torch.ones(1 << 17, dtype=torch.uint8))
print(resident() - before)
blocks.clear()
print(resident() - before)
"""

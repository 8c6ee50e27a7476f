"""What the allocator is told, it does: freed blocks stay with the process, or go."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_toy import in_child

from entrenar.train.allocator import keep_freed_memory, return_freed_blocks
from entrenar.train.oom import return_freed_memory

BLOCK = 1 << 24


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _left_after_free(tell: Callable[[], bool], report: Path) -> int:
    """Return how much of eight freed blocks, with a small one kept above each, is still resident."""

    def allocate() -> None:
        assert tell()
        gc.collect()
        return_freed_memory()  # of the tests before this one
        before = _resident_bytes()
        blocks, pins = [], []
        for _ in range(8):
            blocks.append(torch.ones(BLOCK, dtype=torch.uint8))
            pins.append(torch.ones(1 << 17, dtype=torch.uint8))
        assert _resident_bytes() - before > 7 * BLOCK
        blocks.clear()
        report.write_text(str(_resident_bytes() - before))
        os._exit(0)

    assert in_child(allocate) == 0
    return int(report.read_text())


@pytest.mark.parametrize(("tell", "stays"), [(keep_freed_memory, True), (return_freed_blocks, False)])
def test_freed_blocks_stay_or_go(tmp_path: Path, tell: Callable[[], bool], *, stays: bool) -> None:
    """Between blocks in use, freed ones stay resident after `keep_freed_memory` and are gone otherwise."""
    left = _left_after_free(tell, tmp_path / "left")
    assert (left > 7 * BLOCK) if stays else (left < 2 * BLOCK)

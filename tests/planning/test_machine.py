"""The machine's rates, and what its heap covers, are measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrenar.planning.heap import Heap
from entrenar.planning.machine import measure_rates


def test_rates_make_seconds():
    """Time is products and bytes one after the other."""
    rates = measure_rates(torch.float32)
    assert rates.seconds(int(rates.flops_per_s), 0) == pytest.approx(1, rel=1e-6)
    assert rates.seconds(0, int(rates.bytes_per_s)) == pytest.approx(1, rel=1e-6)


def test_a_heap_counts_what_its_blocks_covered_once():
    """A block in the place of a freed one adds nothing; a returned one counts in whole pages while it is there."""
    heap = Heap()
    if not heap.is_there:
        pytest.skip("another C library: its allocator is not asked")
    first = heap.take(1 << 20)
    heap.give_back(first, 1 << 20)
    again = heap.take(1 << 10)
    heap.give_back(again, 1 << 10)
    assert 1 << 20 <= heap.covered_bytes <= (1 << 20) + 4 * 4096
    returning = Heap(returned_from=1 << 20)
    for _ in range(3):
        returning.give_back(returning.take(1 << 20), 1 << 20)
    assert returning.covered_bytes == (1 << 20) + 4096


_UNTOUCHED = """
import ctypes
from entrenar.planning.heap import Heap

heap = Heap()
first, second = heap.take(1 << 24), heap.take(1 << 24)
untouched = heap.resident_bytes
ctypes.memset(first + (1 << 20), 1, 10 * 4096)
print(heap.covered_bytes, untouched, heap.resident_bytes)
"""


def test_what_is_in_memory_of_untouched_blocks_is_found():
    """The page of the allocator's note for each block, and what somebody wrote; the rest is not there.

    In a process of its own: in this one a block may take the place of freed memory that is still there.
    """
    if not Heap().is_there:
        pytest.skip("another C library: its allocator is not asked")
    printed = subprocess.run([sys.executable, "-c", _UNTOUCHED], capture_output=True, text=True, check=True).stdout
    covered, untouched, written = map(int, printed.split())
    assert untouched < covered / 4
    # Where the kernel hands out huge pages, unasked or because an allocator asked, one byte brings all 2 MiB around it.
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    is_huge = huge.is_file() and "[never]" not in huge.read_text()
    assert 10 * 4096 <= written - untouched <= (2 << 21 if is_huge else 11 * 4096)

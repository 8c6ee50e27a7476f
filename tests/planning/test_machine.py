"""What the machine has is read from where the kernel says it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrenar.errors import ConfigError
from entrenar.planning.heap import Heap
from entrenar.planning.machine import cgroup_limits, measure_rates, memory_limit, parse_bytes, status_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6e9), ("512 MiB", 2**29), ("1.5g", 1.5e9), ("24GiB", 24 * 2**30), ("1000b", 1e3)],
)
def test_amounts_of_memory_are_read_with_their_units(text, size):
    """Powers of ten and of two are told apart."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "six", "6 apples", "-1GB", "0", "GB", "9" * 400, "6"])
def test_what_is_no_amount_is_refused(text):
    """The message says what an amount looks like."""
    message = f"^memory must be an amount above 0 with its unit, such as 6GB or 512MiB, got {re.escape(repr(text))}$"
    with pytest.raises(ConfigError, match=message):
        parse_bytes(text)


def test_the_tightest_group_limits(tmp_path):
    """A limit of a parent group counts, less what others in it use; 'max' is none."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("8000\n")
    (inner.parent / "memory.current").write_text("3000\n")
    groups = tmp_path / "groups"
    groups.write_text("0::/outer/inner\n")
    assert [limit.size_bytes for limit in cgroup_limits(tmp_path, groups, own_bytes=1000)] == [6000]


def test_the_limits_of_the_first_version_are_read_too(tmp_path):
    """Only the memory controller's line counts."""
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000")
    groups = tmp_path / "groups"
    groups.write_text("5:cpu,cpuacct:/x\n3:memory:/job\n")
    assert [limit.size_bytes for limit in cgroup_limits(tmp_path, groups, own_bytes=0)] == [5000]


def test_the_room_is_positive_and_holds_this_process():
    """What is available now includes what the process has already."""
    assert memory_limit().size_bytes > status_bytes("VmRSS") / 2 > 1e7
    assert status_bytes("VmHWM") >= status_bytes("VmRSS") * 0.9


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

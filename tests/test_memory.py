"""How much memory there is is read from where the kernel says it."""

import os
import re

import pytest

from entrenar.errors import ConfigError
from entrenar.memory import cgroup_limits, free_bytes, memory_limit, parse_bytes, status_bytes


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
    assert 0 < free_bytes() < memory_limit().size_bytes


def test_other_processes_are_read_too():
    """By number; one that is gone holds nothing."""
    assert status_bytes("VmHWM", os.getpid()) == status_bytes("VmHWM") > 0
    assert status_bytes("VmRSS", 1 << 30) == 0

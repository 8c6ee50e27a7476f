"""A rank knows who is late, and leaves its stack where it stood still."""

import time

import pytest

from entrenar.errors import MachineError
from entrenar.scale.watch import Watch


def test_those_behind_are_late(tmp_path):
    """Counts decide, whatever the clocks say; a rank that has gone is not late."""
    ranks = [Watch(tmp_path, rank, 600) for rank in range(3)]
    for watch in ranks[:2]:
        watch.note()
    assert ranks[0].late() == [2]
    ranks[2].note()
    assert ranks[0].late() == []
    ranks[0].note()
    assert ranks[0].late() == [1, 2]
    for watch in ranks:
        watch.close()
    assert list((tmp_path / "ranks").iterdir()) == []


def test_a_rank_that_stands_still_leaves_its_stack(tmp_path):
    """After half of the time its threads' stacks are in its file, which stays."""
    watch = Watch(tmp_path, 3, 0.2)
    stacks = tmp_path / "ranks" / "rank-3.stacks"
    while "test_a_rank_that_stands_still" not in stacks.read_text():
        time.sleep(0.01)
    watch.close()
    assert stacks.is_file()
    assert not (tmp_path / "ranks" / "rank-3.sums").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """The place of the files is a file."""
    (tmp_path / "ranks").write_text("")
    with pytest.raises(MachineError, match=r"cannot write in .*ranks"):
        Watch(tmp_path, 0, 10)


def test_a_damaged_count_is_no_count(tmp_path):
    """What another rank has not finished writing counts as nothing yet."""
    watch = Watch(tmp_path, 0, 600)
    (tmp_path / "ranks" / "rank-1.sums").write_text("")
    (tmp_path / "ranks" / "rank-x.sums").write_text("9")
    assert watch.late() == [1]
    watch.close()

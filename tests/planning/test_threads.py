"""`planning.threads`: the faster number of threads is taken, and torch's own setting stays."""

import pytest
import torch

from entrenar.planning import threads


@pytest.mark.parametrize(("one", "two", "chosen"), [(1.0, 1.8, 1), (1.0, 0.6, 2), (0.95, 1.0, 2)])
def test_the_faster_number_is_taken(one, two, chosen, monkeypatch):
    """One thread only where it is clearly faster."""
    counts = []

    def seconds(*_):
        counts.append(torch.get_num_threads())
        return {1: one, 2: two}[counts[-1]]

    monkeypatch.setattr(threads, "_seconds", seconds)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert threads.fastest_threads() == chosen
        assert torch.get_num_threads() == 2
        assert {1, 2} == set(counts)
    finally:
        torch.set_num_threads(before)


def test_a_single_thread_is_not_measured(monkeypatch):
    """There is nothing to choose."""
    monkeypatch.setattr(threads, "_seconds", lambda *_: pytest.fail("nothing to measure"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.fastest_threads() == 1


def test_the_chain_is_timed():
    """A positive time, and numbers that stay finite."""
    assert threads._seconds(torch.ones(4, 8), torch.ones(8, 8)) > 0

"""A stranger's pattern matches as PEFT's do, and cannot hold the machine."""

import signal
import threading

import pytest

from entrenar.errors import ConfigError
from entrenar.peft import patterns
from entrenar.peft.patterns import matches

NAME = "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize(
    ("pattern", "is_match"),
    [("up_proj", True), ("p_proj", False), (r"layers\.\d+\.mlp\.up_proj", True), ("mlp", False), (".*", True)],
)
def test_a_pattern_matches_the_end_by_whole_parts(pattern, is_match):
    """PEFT's rule: the pattern is the name, or what follows a dot in it."""
    assert matches(pattern, NAME) is is_match


def test_a_pattern_that_never_ends_is_refused(monkeypatch):
    """Nested repetition is stopped by its CPU time, with a remedy; the alarm's handler is put back."""
    monkeypatch.setattr(patterns, "MAX_CPU_S", 0.1)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ConfigError, match="without one repetition inside of another"):
        matches("(([a-z._0-9])+)+!", NAME)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert matches("up_proj", NAME)


def test_another_thread_matches_without_a_limit():
    """Where no signal can be caught, a sound pattern still works."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(matches("up_proj", NAME)))
    thread.start()
    thread.join()
    assert found == [True]

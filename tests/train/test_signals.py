"""Signals ask once and stop at the second; they are handled only while a run is under way."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from train_toy import in_child, signals_by_default

from entrenar.train.signals import StopSignals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _started_from_a_terminal() -> Iterator[None]:
    with signals_by_default():
        yield


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and a terminal that hangs up are remembered by name, and handlers are put back afterwards."""
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopSignals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    assert [signal.getsignal(each) for each in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_the_second_signal_ends_the_process(number: signal.Signals) -> None:
    """After the first one the kernel's default action is back, for each of the signals."""

    def twice() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), number)

    assert in_child(twice) == -number


def test_an_ignored_signal_stays_ignored() -> None:
    """Under nohup a terminal that hangs up does not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_the_program_decides() -> None:
    """Python allows handlers in the main thread only; elsewhere nothing is changed."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]

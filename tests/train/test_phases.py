"""Phases add up, and each is an OpenTelemetry span."""

import time

import pytest
import torch
from opentelemetry import trace

from entrenar.train.phases import Phases


def test_times_add_up_and_start_again_after_taking() -> None:
    """Two visits of a phase are summed; an error inside still counts; `take` empties the book."""
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases("forward", 1):
            time.sleep(0.01)

    def failing() -> None:
        with phases("backward", 1):
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        failing()
    seconds = phases.take()
    assert 0.02 <= seconds["forward"] < 1.0
    assert seconds["backward"] > 0.0
    assert phases.take() == {}


def test_each_phase_is_a_span_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer of the OpenTelemetry API sees the phase's name and step."""
    spans: list[tuple[str, dict[str, int]]] = []

    class Recorder(trace.NoOpTracer):
        def start_as_current_span(self, name, *arguments, attributes=None, **named):
            spans.append((name, attributes))
            return super().start_as_current_span(name, *arguments, attributes=attributes, **named)

    monkeypatch.setattr(trace, "get_tracer", lambda name: Recorder() if name == "entrenar.train" else None)
    with Phases(torch.device("cpu"))("optimizer", 7):
        pass
    assert spans == [("optimizer", {"entrenar.step": 7})]

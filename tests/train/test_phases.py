"""Phases add up, and each is an OpenTelemetry span."""

import time

import pytest
import torch
from opentelemetry import trace

from entrenar.runs import StepRecord
from entrenar.trace.join import Join
from entrenar.trace.launch import Wants
from entrenar.trace.provider import Provider
from entrenar.trace.recorder import Recorder
from entrenar.trace.spool import Spool
from entrenar.train.phases import Phases, describe_step


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
    assert spans == [("optimizer_step", {"entrenar.step": 7})]


def test_a_runs_spans_form_one_tree(tmp_path) -> None:
    """The run holds its epochs, an epoch its steps, a step its phases and the figures."""
    provider = Provider(Recorder(tmp_path), Wants(tmp_path, 1, 0xF))
    phases = Phases(torch.device("cpu"))
    phases._tracer = provider.get_tracer()
    record = StepRecord(
        step=1, loss=2.0, lr=0.1, grad_norm=1.5, targets=10, targets_per_s=5.0, elapsed_s=1.0, eta_s=None, epoch=None,
        held_out=None, phases_s={},
    )  # fmt: skip
    with phases.run(rank=2):
        for step, epoch in ((1, 0.0), (2, 0.5), (3, 1.0)):
            with phases.step(step, epoch) as span, phases("forward", step):
                describe_step(span, record, 10)
    joined = Join().take(Spool(tmp_path).drain(), (), None)
    names = {span.id: span.name for span in joined.ended} | {0xF: "process"}
    tree = [(names[span.parent], span.name) for span in sorted(joined.ended, key=lambda span: span.id)]
    step = [("epoch", "step"), ("step", "forward_pass")]
    assert tree == [("process", "train"), ("train", "epoch"), *step, *step, ("train", "epoch"), *step]
    attributes = [dict(span.attributes) for span in joined.ended if span.name in ("train", "step")]
    assert attributes[0] == {
        "entrenar.step": 1, "entrenar.loss": 2.0, "entrenar.grad_norm": 1.5, "entrenar.lr": 0.1, "entrenar.tokens": 10,
    }  # fmt: skip
    assert attributes[-1] == {"entrenar.rank": 2}

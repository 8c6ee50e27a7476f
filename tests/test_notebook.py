"""`notebook`: shows a run in a kernel, not too often, and nowhere else."""

import sys
import types

import pytest

from entrenar import notebook
from entrenar.runs import Event, StepRecord

RECORD = StepRecord(
    step=1, loss=2.0, lr=0.1, grad_norm=1.0, targets=10, targets_per_s=5.0, elapsed_s=1.0, eta_s=None, epoch=None,
    held_out=None, phases_s={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("shell", "is_here"),
    [(None, False), (types.SimpleNamespace(), False), (types.SimpleNamespace(kernel=object()), True)],
)
def test_only_a_kernel_is_a_notebook(monkeypatch, shell, is_here):
    """IPython in a terminal has no kernel; without IPython there is no question."""
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert notebook.is_here() is is_here
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.is_here()


def test_steps_are_shown_now_and_then_and_news_at_once(monkeypatch):
    """Two steps in the same moment are one update; an evaluation, an event and the end are always shown."""
    updates, now = [], 0.0
    handle = types.SimpleNamespace(update=lambda shown: updates.append(repr(shown)))
    display = types.SimpleNamespace(display=lambda _, **_options: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now)
    view = notebook.View("a")
    view.stage("Training")
    view.record(RECORD)
    assert updates == ["a: Training"]
    now = 0.6
    view.record(RECORD)
    view.record(RECORD)
    assert len(updates) == 2
    view.record(StepRecord(**{**vars(RECORD), "held_out": {"loss": 1.5}}))
    view.event(Event(1, "spike", "m"))
    assert "spike" in view._repr_html_()
    view.close()
    assert updates[2:] == ["a: step 1  loss 2.0000  held-out 1.5000  5 tokens/s"] * 3

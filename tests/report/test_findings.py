"""`report.findings`: each planted trouble is found, and a clean run has none."""

import json

import pytest

from entrenar.report import findings, read_history

from .conftest import record


def evaluated(losses, training):
    """Return records whose every fifth step was evaluated."""
    return [
        record(n + 1, loss=loss, held_out={"loss": losses[n // 5]} if n % 5 == 4 else None)
        for n, loss in enumerate(training)
    ]


CLEAN = evaluated([2.0, 1.9, 1.86, 1.85, 1.849, 1.8485, 1.848, 1.8479], [2.0 - n / 400 for n in range(40)])
TROUBLE = {
    "The loss was not finite": [record(n, loss=None if n == 7 else 2.0) for n in range(1, 20)],
    "The loss spikes": [record(n, loss=9.0 if n == 80 else 2.0 + n % 3 / 100) for n in range(1, 120)],
    "The model overfits": evaluated([2.0, 1.5, 1.7, 2.1], [2.0 - n / 11 for n in range(20)]),
    "still falling": evaluated([3.0, 2.5, 2.2, 2.0, 1.8, 1.6, 1.4, 1.2], [3.0 - n / 20 for n in range(40)]),
    "waits for data": [record(n, phases_s={"data": 1.0, "forward": 1.0}) for n in range(1, 9)],
    "Saving takes a large share": [record(n, phases_s={"checkpoint": 1.0, "forward": 1.0}) for n in range(1, 9)],
    "became slower": [record(n, targets_per_s=500.0 if n < 30 else 200.0) for n in range(1, 60)],
}


@pytest.mark.parametrize("what", TROUBLE)
def test_a_planted_trouble_is_found(what, make_run):
    """Each comes with evidence and advice."""
    found = findings(read_history(make_run("a", TROUBLE[what])))
    match = [finding for finding in found if what in finding.what]
    assert len(match) == 1
    assert match[0].evidence
    assert match[0].advice


def test_a_clean_run_has_no_trouble(make_run):
    """Nothing but that the last evaluation is the best."""
    assert [finding.kind for finding in findings(read_history(make_run("a", CLEAN)))] == ["good"]


def test_faults_come_first_and_alarms_are_told(make_run):
    """Events of training alarms are findings, saved checkpoints are not."""
    events = [{"step": 3, "kind": "plateau", "message": "no progress"},
              {"step": 4, "kind": "checkpoint_saved", "message": "step-4"}]  # fmt: skip
    rows = [json.loads(json.dumps(row)) for row in TROUBLE["The loss was not finite"]]
    found = findings(read_history(make_run("a", rows, events)))
    assert found[0].kind == "fault"
    assert [finding.advice for finding in found if finding.what == "Plateau."] == ["no progress"]
    assert not any("Checkpoint" in finding.what for finding in found)

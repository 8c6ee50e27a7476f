"""Whichever file operation of a run fails, nothing good is lost, and the error is one that a person can act on.

The N-th operation of a run with saves, pruning and records fails, once or for good, for N from 1 until none fails. Here
a part of all N; `benchmarks/nth_operation.py` takes all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from faults import KINDS, Faults, failing
from train_toy import fingerprint, in_child, run_toy

from entrenar.errors import CheckpointError, MachineError
from entrenar.runs import list_checkpoints
from entrenar.train import latest_good

OPTIONS: Mapping[str, Any] = {
    "save_every": 2,
    "keep_last": 1,
    "keep_best": False,
    "schedule": "constant",
    "max_steps": 8,
}
STRIDE = 22


def outcome_of(folder: Path, at: int, kind: str, *, is_lasting: bool) -> dict[str, Any]:
    """Run the toy with a failing operation in a child; return what happened there, "bug" if it must not."""
    faults = Faults(folder / "run", at, KINDS[kind], is_lasting)

    def run() -> None:
        ending, message = "ended", ""
        with failing(faults):
            try:
                run_toy(folder / "run", **OPTIONS)
            except MachineError as error:
                ending, message = "refused", str(error)
            except Exception as error:  # noqa: BLE001  # the finding
                ending, message = "bug", repr(error)
        report = {"ending": ending, "message": message, "seen": faults.seen, "failed": faults.failed[:3]}
        (folder / "report.json").write_text(json.dumps(report))

    folder.mkdir()
    assert in_child(run) == 0
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    if report["ending"] == "refused" and str(folder) not in report["message"]:
        report |= {"ending": "bug", "message": f"names no file: {report['message']}"}
    return report


def fault_after(folder: Path, whole: Mapping[str, Any]) -> str | None:
    """Say what the failure cost: a run that cannot be resumed to the undisturbed end, or leftovers in its way."""
    checkpoints = folder / "run" / "checkpoints"
    if list_checkpoints(checkpoints):
        try:
            latest_good(checkpoints)
        except CheckpointError as error:
            return f"no good checkpoint: {error}"
    if in_child(lambda: run_toy(folder / "run", resume=True, **OPTIONS)) != 0:
        return "cannot be resumed"
    return None if fingerprint(folder / "run") == whole else "ends elsewhere than the undisturbed run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], int]:
    """The undisturbed end, and the number of operations on the way."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    report = outcome_of(folder, 0, "EIO", is_lasting=False)
    assert report["ending"] == "ended"
    return fingerprint(folder / "run"), report["seen"]


@pytest.mark.chaos
@pytest.mark.parametrize("is_lasting", [False, True])
@pytest.mark.parametrize("first", [1, 8])
def test_any_operation_may_fail(tmp_path: Path, whole: tuple[Mapping[str, Any], int], first: int, *, is_lasting: bool):
    """The run ends with its result, or with an error that names the file; either way it is resumed to the same end."""
    expected, operations = whole
    assert operations > 100
    kinds = list(KINDS)
    for number, at in enumerate(range(first, operations + 1, STRIDE)):
        kind = kinds[number % len(kinds)]
        report = outcome_of(tmp_path / f"{at}", at, kind, is_lasting=is_lasting)
        assert report["ending"] in ("ended", "refused"), (at, kind, report)
        assert fault_after(tmp_path / f"{at}", expected) is None, (at, kind, report)

"""The andon cord of quality: a run whose code dropped by more than 5 points does not begin, and says why."""

import re
import subprocess

import pytest

from entrenar.cli.code_inspection import code_inspector
from entrenar.cli.main import main
from entrenar.errors import ConfigError, FormatError, NotMeasured, QualityRegression, TrainingHalted
from entrenar.quality.andon import TrainingMonitor, inspect_code

GOOD = '"""Good."""\n\n\ndef double(x: int) -> int:\n    """Give twice."""\n    return 2 * x\n'
WORSE = GOOD + "\n\ndef worse(x):\n" + "".join(f"    if x == {n}:\n        print({n})\n" for n in range(40))


@pytest.mark.parametrize(("now", "holds"), [(95.0, True), (90.0, True), (89.9, False), (0.0, False), (100.0, True)])
def test_the_cord_is_pulled_beyond_five_points(now, holds):
    """A drop of 5.0 passes, 5.1 does not; the message is the specification's."""
    monitor = TrainingMonitor(95.0, now)
    if holds:
        monitor.check_quality_regression()
        return
    said = (
        "\N{POLICE CARS REVOLVING LIGHT} ANDON CORD: Training halted due to quality regression. "
        "Code quality dropped by >5 points. Fix quality issues before resuming training."
    )
    with pytest.raises(QualityRegression, match=re.escape(said)):
        monitor.check_quality_regression()


def test_a_score_that_was_not_measured_is_no_pass():
    """Either one missing."""
    for scores in ((None, 90.0), (90.0, None)):
        with pytest.raises(NotMeasured, match="was not measured"):
            TrainingMonitor(*scores).check_quality_regression()


def test_a_regression_halts_training():
    """It is one of training's alarms, with their exit code."""
    assert issubclass(QualityRegression, TrainingHalted)
    assert QualityRegression.exit_code == 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Ten good files with their baseline, in a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for number in range(10):
        (tmp_path / "src" / f"a{number}.py").write_text(GOOD.replace("double", f"double{number}"))
    subprocess.run(["git", "init", "-q"], check=True)
    assert main(["quality", "baseline", "create", "--path", "src", "--output", "base.json"]) == 0
    return tmp_path


def test_one_degraded_file_stops_a_run_before_its_first_step(project, capsys):
    """Its mean hides in ten files, so each file is held too. Nothing is made, exit code 1."""
    (project / "src" / "a3.py").write_text(WORSE)
    assert main(["train", "--name", "r", "--quality-gate", "base.json"]) == 1
    message = capsys.readouterr().err
    assert "ANDON CORD: Training halted due to quality regression" in message
    assert "src/a3.py: `entrenar quality tdg src --explain` shows what costs most" in message
    assert not (project / "runs").exists()
    with pytest.raises(QualityRegression):
        inspect_code(project / "base.json", project)


def test_what_a_checkpoint_remembers(project):
    """Commit, changes, score, baseline; without a baseline git's state alone."""
    inspect = code_inspector(project / "base.json")
    assert set(inspect()) == {"commit", "dirty", "score", "baseline"}
    assert inspect()["score"] == {"total": 100.0, "grade": "A+"}
    assert set(code_inspector(None)()) == {"commit", "dirty"}
    (project / "src" / "a3.py").write_text(WORSE)
    with pytest.raises(QualityRegression):
        inspect()


def test_outside_of_a_repository_nothing_is_known(tmp_path, monkeypatch):
    """No commit, and no error."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert code_inspector(None)() == {}


def test_a_gate_that_cannot_be_held_is_refused(project):
    """A missing or damaged baseline stops the run with exit code 2: it neither passed nor failed."""
    with pytest.raises(ConfigError, match="there is no baseline"):
        code_inspector(project / "none.json")
    (project / "base.json").write_text("{}")
    with pytest.raises(FormatError, match="is no baseline"):
        code_inspector(project / "base.json")
    assert main(["train", "--name", "r", "--quality-gate", "base.json"]) == 2

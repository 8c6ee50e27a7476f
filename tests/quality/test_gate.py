"""Gates: a verdict from an exit code and a number, never from absence; and each is shown to fail on its own defect."""

import subprocess

import pytest

from entrenar.errors import ConfigError
from entrenar.quality import commands, gate, selftest

CODE = "import sys; text = open('score.txt').read(); print('score', text); sys.exit('bad' in text)"
GATES = f'''
[[gate]]
name = "score"
tiers = [1]
phases = ["p1"]
run = """python -c "{CODE}" """
number = 'score ([\\d.]+)'
least = 90
fix = "write a better score.txt"
expect = "at least 90 wanted"
[[gate.plant]]
file = "score.txt"
text = "89.9"

[[gate]]
name = "words"
tiers = [2]
run = """python -c "{CODE}" """
fix = "take out what is bad"
expect = "score 95 bad"
[[gate.plant]]
file = "score.txt"
old = "95"
new = "95 bad"
'''


@pytest.fixture
def project(tmp_path):
    """Two gates on one file, in a repository."""
    (tmp_path / "quality").mkdir()
    (tmp_path / "score.txt").write_text("95")
    (tmp_path / "quality" / "gates.toml").write_text(GATES)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def gates(project):
    return gate.load(project / gate.GATES_FILE)


def verdicts(project):
    return [result.verdict for result in gate.run_gates(gates(project), project)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("95", ["passed", "passed"]),
        ("90", ["passed", "passed"]),
        ("89.99", ["failed", "passed"]),
        ("95 bad", ["failed", "failed"]),
        ("none", ["not measured", "passed"]),
        ("9.9.9", ["not measured", "passed"]),
        (None, ["failed", "failed"]),
    ],
)
def test_a_gate_needs_its_exit_code_and_its_number(project, text, found):
    """At the bound it passes; a number that is missing or none is not measured, whatever the exit code says."""
    (project / "score.txt").unlink()
    if text is not None:
        (project / "score.txt").write_text(text)
    assert verdicts(project) == found


@pytest.mark.parametrize(
    ("command", "verdict", "reason"),
    [
        ("true", "passed", ""),
        ("false", "failed", ""),
        ("python -c 'import sys; sys.exit(5)'", "not measured", "ended with 5"),
        ("python -c 'import os; os.abort()'", "not measured", "ended with -6"),
        ("no-such-program --flag", "not measured", "no-such-program cannot be run"),
        ("sleep 30", "not measured", "not done after 0.2 s"),
        ("python -c 'print(1)' && false", "passed", ""),
    ],
)
def test_only_0_passes_and_only_1_fails(tmp_path, command, verdict, reason):
    """A missing tool, a crash, a time-out and another code are not measured; there is no shell."""
    outcome = commands.run(command, tmp_path, 0.2 if "sleep" in command else 60)
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


@pytest.mark.parametrize(("command", "message"), [("say 'hi", "balanced quotes"), ("  ", "must not be empty")])
def test_a_command_that_is_none_is_refused(tmp_path, command, message):
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        commands.run(command, tmp_path, 1)


def test_a_tier_holds_those_below_it(project):
    """Tier 2 runs tier 1's gates too; a phase and names choose their own."""
    every = gates(project)
    names = [[one.name for one in gate.chosen(every, *which)] for which in
             ((1, None, []), (2, None, []), (None, "p1", []), (None, None, []), (None, None, ["words"]))]  # fmt: skip
    assert names == [["score"], ["score", "words"], ["score"], ["score", "words"], ["words"]]
    with pytest.raises(ConfigError, match="no gate 'word'; there are score, words"):
        gate.chosen(every, None, None, ["word"])


def test_the_table_says_what_was_measured_and_how_to_fix_it(project):
    """Verdict, number, bound; the remedy where it did not pass. JSON has the same numbers."""
    (project / "score.txt").write_text("80")
    results = list(gate.run_gates(gates(project), project))
    text = "\n".join(gate.table(results))
    assert "failed       score         80  at least 90" in text
    assert "80, at least 90 wanted; fix: write a better score.txt" in text
    table = gate.as_json(results)
    assert table["verdict"] == "failed"
    assert [row["measured"] for row in table["gates"]] == [80, None]


def test_each_gate_notices_its_violation_and_the_tree_stays_as_it_is(project):
    """In a scratch copy, one plant at a time."""
    trials = list(selftest.trials(gates(project), project))
    assert [trial.noticed for trial in trials] == [True, True]
    assert (project / "score.txt").read_text() == "95"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("least = 90", "least = 80", "passed with the violation in place"),
        ('expect = "at least 90 wanted"', 'expect = "other words"', "failed, but for another reason"),
        ("run = \"\"\"python", "run = \"\"\"no-python", "not measured with the violation in place"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_fail_is_found(project, old, new, fault):
    """Too low a bound, a failure for another reason, a tool that is not there."""
    place = project / "quality" / "gates.toml"
    place.write_text(place.read_text().replace(old, new))
    trial = next(selftest.trials(gates(project), project))
    assert not trial.noticed
    assert fault in trial.fault


def test_a_plant_that_changes_nothing_is_refused(project):
    """Its text moved away: it would test nothing."""
    (project / "score.txt").write_text("96")
    with pytest.raises(ConfigError, match="must replace text that is there; '95' is not"):
        list(selftest.trials(gates(project)[1:], project))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GATES, "", "must hold gates"),
        (GATES, "x = ", "must be TOML"),
        ('name = "words"', 'name = "score"', "a name of its own; has score, score"),
        ("tiers = [1]", "tiers = [4]", "tiers must be among"),
        ('phases = ["p1"]', 'phases = ["p9"]', "phases among"),
        ('fix = "write', 'fixx = "write', "unknown fixx"),
        ('expect = "at least 90 wanted"', "", "expect missing"),
        ("number = ", "#", "least and most need `number`"),
        ("'score ([", "'score (([", "unterminated|missing"),
        ('[[gate.plant]]\nfile = "score.txt"\ntext = "89.9"', "", "plant missing"),
        ('text = "89.9"', 'txt = "89.9"', "unexpected keyword"),
    ],
)
def test_bad_gates_are_refused(project, old, new, message):
    """A gate without a plant among them: no gate goes untested."""
    place = project / "quality" / "gates.toml"
    place.write_text(place.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        gates(project)


def test_missing_gates_are_refused(tmp_path):
    """With where they should be."""
    with pytest.raises(ConfigError, match="toml is missing"):
        gates(tmp_path)

"""Scores add up, the report reads as the specification's, and the gate says no to each way of being bad."""

from dataclasses import replace

import pytest

from entrenar.errors import ConfigError, GateFailed
from entrenar.quality.mutation.report import Argued, demand_score, load_argued, report, score, summary
from entrenar.quality.mutation.verdicts import Verdict
from entrenar.quality.risk import Component

KILLED = Verdict(
    "a.py", 3, "f", "never", "if x:", "if x", "if False", 1, "killed", "tests/test_a.py::test_f[1]", "assertion"
)
CRASHED = replace(KILLED, line=4, how="crash", code="if y:", original="if y")
SURVIVED = replace(KILLED, line=5, status="survived", killed_by="", how="", code="if z:", original="if z")
TIMEOUT = replace(KILLED, line=6, status="timeout", killed_by="", how="")
ARGUED = Argued("a.py", "f", "if z:", "if z", "if False", "equivalent", "both branches return the same value")
A = Component("a", ("a.py",), mutation=60)


def test_scores_count_kills_among_those_with_a_verdict():
    """Timeouts are in no score; the strict one leaves crashes out on both sides."""
    counts = score([KILLED, KILLED, CRASHED, SURVIVED, TIMEOUT])
    assert counts.total == 5
    assert counts.percent == 75.0
    assert counts.strict_percent == pytest.approx(200 / 3)
    assert counts.percent_without_verdict == 20.0
    assert score([]).percent == score([]).strict_percent == score([]).percent_without_verdict == 0.0


def test_the_summary_has_pmats_names_and_adds_up():
    """Totals are those of the files."""
    other = replace(KILLED, file="b.py")
    figures = summary([KILLED, SURVIVED, TIMEOUT, other], [ARGUED])
    assert {k: figures[k] for k in ("total_mutants", "killed", "survived", "timeouts", "mutation_score")} == {
        "total_mutants": 4, "killed": 2, "survived": 1, "timeouts": 1, "mutation_score": 66.67
    }  # fmt: skip
    assert figures["files"]["a.py"]["survived_but_argued"] == 1
    assert sum(file["total_mutants"] for file in figures["files"].values()) == figures["total_mutants"]


def test_the_report_reads_as_the_specifications():
    """One line a mutant, the score, the target."""
    lines = list(report("a.py", [KILLED, SURVIVED, TIMEOUT], [], 85, failures_only=False))
    assert lines[0] == "Mutating a.py"
    assert lines[1] == "  ✅ a.py:3: KILLED by test_f[1] (if x → if False)"
    assert lines[2] == "  ❌ a.py:5: SURVIVED (add missing test!) f: if z: (if z → if False)"
    assert lines[3].startswith("  ⏱️ a.py:6: NO VERDICT, timeout")
    assert lines[5] == "Mutation Score: 50.0% (1 killed / 2 total)"
    assert lines[7] == "Target: 85% - FAIL ❌"
    lines = list(report("a.py", [KILLED, SURVIVED], [ARGUED], 50, failures_only=True))
    assert lines[1] == "  ⏭️ a.py:5: EQUIVALENT: both branches return the same value (if z → if False)"
    assert lines[-1] == "Target: 50% - PASS ✅"
    unreachable = replace(ARGUED, verdict="unreachable")
    lines = list(report("a.py", [SURVIVED], [unreachable], None, failures_only=True))
    assert "SKIPPED (unreachable)" in lines[1]


def test_a_good_score_with_argued_survivors_passes():
    """Nothing is raised."""
    demand_score([KILLED, KILLED, SURVIVED], [A], [ARGUED])


@pytest.mark.parametrize(
    ("verdicts", "argued", "message"),
    [
        ([KILLED, SURVIVED], [ARGUED], r"^a\.py: mutation score 50\.00 %, at least 60 % wanted$"),
        ([KILLED] * 20 + [SURVIVED], [], r"^a\.py:5: survived: if z: \(if z → if False\); kill it, or argue it"),
        ([KILLED] * 20 + [TIMEOUT], [], r"^a: 1 timeouts and 0 errors are 4\.8 % without a verdict, at most 2 %"),
        ([KILLED], [ARGUED], r"^equivalents\.toml: no survivor is f: if z: → if False; delete it$"),
        ([], [], r"^a\.py: no mutant was tried; was the file moved\?$"),
        (
            [KILLED] * 9 + [SURVIVED],
            [replace(ARGUED, verdict="unreachable")],
            r"^equivalents\.toml: f: if z: is reached by tests, so not unreachable$",
        ),
    ],
)
def test_the_gate_says_no(verdicts, argued, message):
    """Each fault fails the gate, in words."""
    with pytest.raises(GateFailed, match=message):
        demand_score(verdicts, [A], argued)


def test_an_argument_may_name_one_of_equal_slips():
    """With an occurrence it means that one, without it all."""
    second = replace(SURVIVED, occurrence=2)
    assert ARGUED.means(SURVIVED)
    assert ARGUED.means(second)
    assert not replace(ARGUED, occurrence=1).means(second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[mutant]]\nfile = 1 2", r"each \[\[mutant\]\] has file, function, code"),
        ('[[mutant]]\nfile = "a.py"', r"each \[\[mutant\]\] has file, function, code"),
        (
            'verdict = "true"\nwhy = "it is the same value"',
            r'verdict must be "equivalent" or "unreachable", got \'true\'',
        ),
        ('verdict = "equivalent"\nwhy = "obvious"', r"say why no test can kill 'if False', got 'obvious'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, text, message):
    """An entry needs its keys, a known verdict, and a reason of more than a word or two."""
    path = tmp_path / "equivalents.toml"
    head = '[[mutant]]\nfile = "a.py"\nfunction = "f"\ncode = "if x:"\noriginal = "if x"\nmutated = "if False"\n'
    path.write_text(text if text.startswith("[[") else head + text)
    with pytest.raises(ConfigError, match=message):
        load_argued(path)


def test_no_file_means_no_arguments(tmp_path):
    """A project without equivalents argues nothing."""
    assert load_argued(tmp_path / "equivalents.toml") == []

"""The baseline: deterministic bytes, exact limits, refusal of what cannot be compared or read."""

import json

import pytest

from entrenar.errors import ConfigError, FormatError
from entrenar.quality.debt import baseline
from entrenar.quality.debt.measure import Unmeasured
from entrenar.quality.debt.score import FileScore, TreeScore

SCORER = {"formula": "1", "ruff": "0.17.6"}


def scores(**files):
    return baseline.Baseline(SCORER, "src", sum(files.values()) / len(files), files)


def tree(**files):
    return TreeScore(tuple(FileScore(name, score, {}, (), (), 9) for name, score in files.items()), {}, ())


@pytest.mark.parametrize(("now", "holds"), [(85.0, True), (84.9, False), (84.9999, False), (90.0, True), (99.0, True)])
def test_a_drop_of_the_limit_passes_and_more_does_not(now, holds):
    """5.0 passes; 5.1, and 5.0001, do not."""
    found = baseline.compare(scores(a=90.0), scores(a=now))
    assert (not found.violations(5.0)) is holds


@pytest.mark.parametrize(("before", "now"), [(97.3, 92.3), (90.1, 85.1), (64.7, 59.7)])
def test_the_limit_does_not_fail_by_rounding(before, now):
    """Binary fractions of 5.0 are 5.0."""
    assert not baseline.compare(scores(a=before), scores(a=now)).violations(5.0)


def test_the_worst_drop_comes_first():
    """Files and the tree in one list."""
    found = baseline.compare(scores(a=90.0, b=90.0), scores(a=80.0, b=70.0))
    assert [drop.what for drop in found.violations(5.0)] == ["b", "all files", "a"]


def test_a_new_clean_file_cannot_pay_for_a_worse_one():
    """The tree is compared over the files of both."""
    found = baseline.compare(scores(a=90.0), scores(a=80.0, new=100.0))
    assert (found.tree.before, found.tree.now) == (90.0, 80.0)


def test_a_new_file_is_held_against_the_tree_s_baseline():
    """It may not be worse than the tree was, by more than the limit."""
    for score, names in ((85.0, []), (84.0, ["new"])):
        found = baseline.compare(scores(a=90.0), scores(a=90.0, new=score))
        assert [drop.what for drop in found.violations(5.0)] == names


def test_a_file_that_is_gone_is_told():
    """It takes no part in the comparison."""
    found = baseline.compare(scores(a=90.0, old=20.0), scores(a=90.0))
    assert found.removed == ("old",)
    assert found.tree.points == 0


@pytest.mark.parametrize("scorer", [{**SCORER, "formula": "2"}, {"formula": "1"}, {**SCORER, "python": "3.12"}])
def test_scores_by_different_scorers_are_refused(scorer):
    """Another formula, another tool, one more or fewer."""
    with pytest.raises(FormatError, match="different scorers cannot be compared"):
        baseline.compare(scores(a=90.0), baseline.Baseline(scorer, "src", 90.0, {"a": 90.0}))


def test_trees_without_a_common_file_are_refused():
    """A comparison of nothing would pass."""
    with pytest.raises(FormatError, match="no file in common"):
        baseline.compare(scores(a=90.0), scores(b=90.0))


def test_the_bytes_are_the_same_for_the_same_scores(tmp_path):
    """Whatever the order of the files; and what is read is what was written."""
    one = baseline.from_tree(tree(b=80.0, a=90.123456), SCORER, "src")
    two = baseline.from_tree(tree(a=90.123456, b=80.0), SCORER, "src")
    for made, name in ((one, "one.json"), (two, "deep/two.json")):
        baseline.write(made, tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "deep/two.json").read_bytes()
    assert baseline.read(tmp_path / "one.json") == one


def test_a_tree_with_gaps_makes_no_baseline():
    """The gap is named."""
    gap = TreeScore((), {"a.py": Unmeasured("syntax error: x", 3)}, ())
    with pytest.raises(FormatError, match=r"must have no gaps; a\.py:3"):
        baseline.from_tree(gap, SCORER, "src")
    with pytest.raises(FormatError, match="needs a file with code"):
        baseline.from_tree(tree(), SCORER, "src")


def _changed(**fields):
    return json.dumps({"schema": 1, "scorer": SCORER, "path": "src", "score": 90, "files": {"a": 90}} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not valid JSON"), ("{", "is not valid JSON"), ("[]", "is no baseline"), ("{}", "is no baseline"),
     (_changed(schema=2), "must have schema 1, has 2"), (_changed(files=3), "is no baseline"),
     (_changed(files={"a": "high"}), "is no baseline"), (_changed(score=None), "is no baseline"),
     (_changed(scorer=None), "is no baseline"), (_changed(score=101), "not within 0 and 100"),
     (_changed(files={"a": -1}), "not within 0 and 100"), ("[" * 5000, "is not valid JSON")],
)  # fmt: skip
def test_a_damaged_baseline_is_refused(tmp_path, text, message):
    """With what is wrong and how to make another."""
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        baseline.read(tmp_path / "b.json")


def test_a_missing_baseline_is_refused(tmp_path):
    """With the command that makes it."""
    with pytest.raises(ConfigError, match="there is no baseline to compare with; `entrenar quality baseline create"):
        baseline.read(tmp_path / "b.json")

"""The formula: strictly monotone, bounded, and with the specification's table of grades."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError
from entrenar.quality.debt import formula

PARTS = st.sampled_from(sorted(formula.WEIGHTS))
DEBTS = st.dictionaries(PARTS, st.floats(0, 60))


def test_the_parts_share_a_hundred_points_as_the_original_does():
    """25, 20, 20, 15, 10, 10; and every rule belongs to one of the parts."""
    assert list(formula.WEIGHTS.values()) == [25, 20, 20, 15, 10, 10]
    assert {rule.part for rule in formula.RULES.values()} == set(formula.WEIGHTS)
    assert set(formula.LINT.values()) <= set(formula.RULES)


@pytest.mark.parametrize("name", formula.RULES)
def test_a_rule_costs_nothing_up_to_its_limit_and_more_with_each_unit_above(name):
    """Zero at the limit; then strictly more."""
    rule = formula.RULES[name]
    assert rule.debt(rule.limit) == 0
    assert 0 < rule.debt(rule.limit + 1) < rule.debt(rule.limit + 2)


@given(DEBTS, PARTS, st.floats(0.01, 20))
def test_debt_always_lowers_the_score(debts, part, more):
    """Any debt that is added to any part makes the score strictly smaller, within 0 and 100."""
    after = {**debts, part: debts.get(part, 0.0) + more}
    assert 0 <= formula.score(after) < formula.score(debts) <= 100


@given(PARTS, st.floats(0, 1e6))
def test_a_part_loses_no_more_than_it_owes_and_no_more_than_its_weight(part, debt):
    """The dampening only ever softens."""
    assert 0 <= formula.lost(part, debt) <= min(debt + 1e-9, formula.WEIGHTS[part])


def test_small_debts_cost_what_they_owe():
    """One point of debt costs 0.95 to 0.98 points."""
    assert all(0.95 < formula.lost(part, 1.0) < 0.99 for part in formula.WEIGHTS)


@given(st.lists(st.floats(0, 100), min_size=1), st.data())
def test_a_worse_file_makes_a_worse_tree(scores, data):
    """Lowering one file's score never raises the mean."""
    index = data.draw(st.integers(0, len(scores) - 1))
    lower = data.draw(st.floats(0, scores[index]))
    after = [*scores[:index], lower, *scores[index + 1 :]]
    assert formula.mean(after) <= formula.mean(scores)


def test_a_mean_of_nothing_is_refused():
    """An empty tree has no score, not a perfect one."""
    with pytest.raises(ValueError, match="no scores"):
        formula.mean([])


@pytest.mark.parametrize(("name", "least"), formula.GRADES)
def test_a_grade_begins_at_its_least_score(name, least):
    """At the boundary the grade is reached; just below it is the next one."""
    assert formula.grade(least) == name
    if least:
        below = formula.grade(math.nextafter(least, 0.0))
        assert below != name
        assert formula.least_score(below) < least


def test_the_labels_that_the_specification_prints_hold():
    """90 is A- and 85 is B+, and LLaMA's A is 93."""
    assert (formula.grade(90), formula.grade(85), formula.least_score("A")) == ("A-", "B+", 93)


@pytest.mark.parametrize("name", ["a", "E", "", "A++", "93"])
def test_an_unknown_grade_is_refused(name):
    """The message lists the grades."""
    with pytest.raises(ConfigError, match="one of A\\+, A, A-"):
        formula.least_score(name)


@pytest.mark.parametrize(
    ("code", "rule"),
    [("F403", "star"), ("F401", "style"), ("FIX002", "admitted"), ("D104", "undocumented-file"),
     ("B006", "style"), ("BLE001", "style"), ("F722", None), ("F405", None), ("C901", None), ("invalid-syntax", None)],
)  # fmt: skip
def test_the_longest_prefix_of_a_lint_code_decides(code, rule):
    """F403 is a star import, other F are style, and ignored codes are nothing."""
    assert formula.lint_rule(code) == rule


def test_the_explanation_holds_every_number():
    """Each weight, rule and grade is printed."""
    text = "\n".join(formula.explanation())
    for name, rule in formula.RULES.items():
        assert name in text
        assert f"{rule.rate:g}" in text
    assert all(f"{name} {least:g}" in text for name, least in formula.GRADES)

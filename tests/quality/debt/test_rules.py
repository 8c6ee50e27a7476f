"""Rules: what two files demand, joined to the stricter, and what is refused."""

import pytest

from entrenar.errors import ConfigError
from entrenar.quality.debt import check, rules
from entrenar.quality.debt.score import FileScore, Finding, TreeScore


@pytest.fixture
def place(tmp_path):
    """Write the files of rules and load them."""

    def load(text="", project="", **more):
        (tmp_path / ".pmat").mkdir(exist_ok=True)
        (tmp_path / ".pmat" / "tdg-rules.toml").write_text(text)
        (tmp_path / "pyproject.toml").write_text(project)
        for name, content in more.items():
            (tmp_path / ".pmat" / f"{name}.toml").write_text(content)
        return rules.load(tmp_path)

    return load


def test_without_rules_nothing_is_demanded(tmp_path):
    """The default drop stands all the same."""
    assert rules.load(tmp_path) == rules.Rules()
    assert rules.Rules().drop == 5.0


def test_both_files_hold_and_the_stricter_demand_stands(place):
    """Whichever file says it."""
    found = place(
        'min_grade = "B"\nmax_score_drop = 3\nllama_min_grade = "A"\nexclude = ["x/*"]\npaths.llama = ["src/ops/*"]\n',
        '[tool.entrenar.quality]\nmin_grade = "A-"\nmin_mean_score = 95\nmax_score_drop = 5.0\nexclude = ["y/*"]\n',
    )
    assert (found.min_grade, found.min_mean_score, found.drop) == ("A-", 95, 3)
    assert set(found.exclude) == {"x/*", "y/*"}
    assert found.grade_of("src/ops/a.py") == "A"
    assert found.grade_of("src/other.py") == "A-"


def test_a_drop_of_zero_can_be_demanded(place):
    """Zero is a value, not absence."""
    assert place("max_score_drop = 0\n").drop == 0


def test_rules_may_include_others(place):
    """From the including file's folder; twice is no circle."""
    inner = 'include = ["c.toml"]\n'
    found = place('include = ["a.toml", "b.toml"]\n', a=f'min_grade = "C"\n{inner}', b=inner, c="min_mean_score = 80\n")
    assert (found.min_grade, found.min_mean_score) == ("C", 80)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ('min_grad = "A"', {}, "unknown rule 'min_grad'; did you mean min_grade"),
        ("zzz = 1", {}, "unknown rule 'zzz'; there are min_grade"),
        ('min_grade = "E"', {}, "min_grade: a grade must be one of"),
        ('llama_min_grade = "a"', {}, "llama_min_grade: a grade must be one of"),
        ('llama_min_grade = "A"', {}, r"llama_min_grade needs the files.*\[paths\] llama"),
        ("min_grade = 93", {}, "min_grade must be str, got 93"),
        ("max_score_drop = true", {}, "max_score_drop must be int or float, got True"),
        ("max_score_drop = -1", {}, "must be within 0 and 100, got -1"),
        ("min_mean_score = nan", {}, "must be within 0 and 100"),
        ('exclude = "x"', {}, "exclude must be list"),
        ("exclude = [1]", {}, r"exclude must be list of text, got \[1\]"),
        ('[paths]\nllama = "x"', {}, "paths must be dict of text"),
        ("min_grade = ", {}, "must be TOML"),
        ('include = ["nowhere.toml"]', {}, "nowhere.toml is missing, and rules include it"),
        ('include = ["tdg-rules.toml"]', {}, "must not include themselves: tdg-rules.toml -> tdg-rules.toml"),
        ('include = ["a.toml"]', {"a": 'include = ["b.toml"]', "b": 'include = ["a.toml"]'}, "a.toml -> b.toml -> a"),
    ],
)
def test_bad_rules_are_refused(place, text, more, message):
    """Key, rule, value."""
    with pytest.raises(ConfigError, match=message):
        place(text, **more)


def test_a_rule_in_the_wrong_encoding_is_refused(tmp_path):
    """Not a stack trace."""
    (tmp_path / "pyproject.toml").write_bytes(b"x = '\xff'\n")
    with pytest.raises(ConfigError, match="must be TOML"):
        rules.load(tmp_path)


def file(path, score):
    finding = Finding("length", 7, 90, "f: 90 code lines")
    return FileScore(path, score, {"structural": 100 - score}, (finding,), (), 9)


def tree(**files):
    return TreeScore(tuple(file(path, score) for path, score in files.items()), {}, ())


@pytest.mark.parametrize(("grade", "score"), [("A", 93.0), ("A-", 90.0), ("F", 0.0), ("A+", 97.0)])
def test_a_grade_is_reached_exactly(grade, score):
    """At the number, not a hair below: no rounding up."""
    assert not check.violations(tree(a=score), rules.Rules(min_grade=grade))
    if score:
        assert check.violations(tree(a=score - 1e-9), rules.Rules(), grade)


GRADES = ("A+", "A", "A-", "B+", "B", "B-", "C+", "C", "C-", "D")
LEAST = (97, 93, 90, 85, 80, 75, 70, 65, 60, 50)


@pytest.mark.parametrize("wanted", GRADES)
@pytest.mark.parametrize("reached", range(len(GRADES)))
def test_every_pair_of_grades_compares_as_numbers(wanted, reached):
    """A- is below A although it sorts after it as text."""
    held = not check.violations(tree(a=float(LEAST[reached])), rules.Rules(min_grade=wanted))
    assert held is (reached <= GRADES.index(wanted))


def test_a_violation_says_what_costs_most():
    """File, score, demand, line."""
    (violation,) = check.violations(tree(a=80.0, b=95.0), rules.Rules(min_grade="A-"))
    assert str(violation) == (
        "a: 80.00 B, at least 90 A- wanted; most is lost in line 7: f: 90 code lines (-20.0)"
    )  # fmt: skip


def test_the_mean_has_a_demand_of_its_own():
    """All files at A-, their mean below 95."""
    (violation,) = check.violations(tree(a=94.0, b=95.0), rules.Rules(min_grade="A-", min_mean_score=95.0))
    assert violation.what == "all files"
    assert "begin with a" in violation.remedy
    assert not check.violations(tree(a=94.0, b=96.0), rules.Rules(min_mean_score=95.0))

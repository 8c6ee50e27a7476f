"""The score of real source: it falls when debt is added, whatever debt, wherever, and says where and how much."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.quality.debt import formula, measure, score

from . import planted

TURNED = st.fixed_dictionaries({}, optional={name: st.integers(0, most) for name, most in planted.KNOBS.items()})


def scored(*trees):
    """Score each tree; all files are linted in one go."""
    contents = {f"{index}/{path}": text.encode() for index, tree in enumerate(trees) for path, text in tree.items()}
    found = measure.measure(contents, {key: key.rpartition("/")[2] for key in contents}, 1)
    return [
        score.score_tree({path: found[f"{index}/{path}"] for path in tree}) for index, tree in enumerate(trees)
    ]  # fmt: skip


def file_of(tree, path="planted.py"):
    return next(file for file in tree.files if file.path == path)


def test_code_without_debt_has_a_hundred_points():
    """The planted tree with every knob at zero owes nothing."""
    (tree,) = scored(planted.tree({}))
    assert file_of(tree).score == 100
    assert not file_of(tree).findings


@pytest.mark.parametrize("knob", planted.KNOBS)
def test_each_kind_of_debt_is_found(knob):
    """Turning one knob costs points, and the findings add up to what was lost."""
    (tree,) = scored(planted.tree({knob: planted.KNOBS[knob]}))
    file = file_of(tree)
    assert file.score < 100
    assert sum(file.cost(finding) for finding in file.findings) == pytest.approx(100 - file.score)


@settings(max_examples=40, deadline=None)
@given(TURNED, st.sampled_from(sorted(planted.KNOBS)), st.integers(1, 5))
def test_debt_never_raises_a_score(knobs, knob, further):
    """Whatever a tree owes already, more of any kind raises no function's, no file's and not the tree's score."""
    more = {**knobs, knob: knobs.get(knob, 0) + further}
    before, after = scored(planted.tree(knobs), planted.tree(more))
    assert after.score <= before.score
    for old, new in zip(before.files, after.files, strict=True):
        assert new.score <= old.score
        functions = {function.name: function.score for function in new.functions}
        assert all(functions[function.name] <= function.score for function in old.functions)


def test_a_function_has_the_score_of_its_own_findings():
    """Debt in one function leaves the others at 100, and costs the file as much."""
    (tree,) = scored(planted.tree({"branches": 20}))
    file = file_of(tree)
    scores = {function.name: function.score for function in file.functions}
    assert scores["Holder.method0"] == 100
    assert scores["worker"] == pytest.approx(file.score)


def test_a_finding_names_line_value_and_limit_passed():
    """21 paths cost 0.4 for each above 8, at the line of `def`."""
    (tree,) = scored(planted.tree({"branches": 20}))
    (finding,) = [finding for finding in file_of(tree).findings if finding.rule == "cyclomatic"]
    lines = planted.tree({"branches": 20})["planted.py"].splitlines()
    assert lines[finding.line - 1].startswith("def worker")
    assert (finding.value, finding.debt) == (21, pytest.approx(0.4 * 13))
    assert finding.text == "worker: cyclomatic complexity 21"


def test_files_without_code_do_not_raise_the_mean():
    """Empty files are not counted."""
    bad = planted.tree({"branches": 20})
    alone, diluted = scored(bad, {**bad, **{f"empty{n}.py": "" for n in range(9)}})
    assert diluted.score == alone.score


def test_a_tree_without_code_has_no_score():
    """Nothing measured is None, never 100."""
    (tree,) = scored({"empty.py": "# nothing\n"})
    assert tree.score is None


def test_a_copy_in_another_file_costs_both():
    """Both places are named in each other's finding."""
    clone = planted.CLONE.format(name="a", one="b", two="c", total="d", item="e")
    renamed = planted.CLONE.format(name="r", one="s", two="t", total="u", item="v")
    (tree,) = scored({"one.py": f'"""One."""\n{clone}', "two.py": f'"""Two."""\n{renamed}'})
    for file, twin in zip(tree.files, ("two.py", "one.py"), strict=True):
        assert file.lost["duplication"] > 1
        assert any(finding.rule == "clone" and twin in finding.text for finding in file.findings)


def test_gaps_and_generated_files_are_told_apart():
    """A syntax error leaves a gap; a generated file is passed over; neither counts."""
    (tree,) = scored({"a.py": "def f(:\n", "b.py": "# @generated\nx = 1\n", "c.py": '"""C."""\nX = 1\n'})
    assert [file.path for file in tree.files] == ["c.py"]
    assert tree.unmeasured["a.py"].reason.startswith("syntax error")
    assert tree.generated == ("b.py",)


def test_every_rule_has_a_knob():
    """No rule is without a planted defect."""
    turned = scored(*(planted.tree({knob: most}) for knob, most in planted.KNOBS.items()))
    found = {finding.rule for tree in turned for file in tree.files for finding in file.findings}
    assert found == set(formula.RULES)

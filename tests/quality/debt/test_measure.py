"""Measuring one file: whatever it holds, there is a measurement or a reason; tools that are missing are named."""

import importlib.metadata
import re
import shutil
import sys

import pytest

from entrenar.errors import MachineError
from entrenar.quality.debt import lint, measure
from entrenar.quality.debt.measure import Unmeasured


def measured(content, name="a.py"):
    return measure.measure({"a": content}, {"a": name}, 1)["a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"def f(:\n", "syntax error"), (b"x = '\xe9'\n", "UTF-8"), (b"x = 1\0\n", "null byte"),
     (b"print 'python 2'\n", "syntax error"), (b"x = " + b"(" * 300 + b")" * 300, "syntax error: too many"),
 (b"if x:\n\ty = 1\n        z = 2\n", "syntax error: ")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_leaves_a_reason(content, reason):
    """Never a score, never a crash."""
    found = measured(content)
    assert isinstance(found, Unmeasured)
    assert re.search(reason, found.reason)


def test_new_syntax_is_measured_although_the_lint_targets_old_python():
    """`match` and `except*` are read; the functions around them have their paths."""
    found = measured(
        b"def f(x):\n    match x:\n        case 1:\n            return 2\n        case 3:\n            return 4\n"
    )
    assert found.linted.cyclomatic == {1: 3}


def test_suppressions_do_not_hide():
    """A finding stays a finding under `noqa`, and complexity under complexipy's own comment."""
    plain = measured(b"def f(a=[]):\n    return a\n").linted.findings
    assert [row[:2] for row in plain if row[0] == "style"] == [("style", 1)]
    assert [row[:2] for row in measured(b"def f(a=[]):  # noqa: B006\n    return a\n").linted.findings] == [
        row[:2] for row in plain
    ]


def test_the_project_s_own_settings_do_not_matter(tmp_path, monkeypatch):
    """A configuration that ignores everything is not read."""
    (tmp_path / "ruff.toml").write_text('lint.ignore = ["ALL"]\n')
    monkeypatch.chdir(tmp_path)
    assert measured(b"import os\n").linted.findings


def test_a_package_may_import_what_it_re_exports():
    """An unused import is a finding in a module and none in `__init__.py`."""
    rules = [row[0] for row in measured(b'"""Doc."""\nfrom a import b\n', "__init__.py").linted.findings]
    assert rules == []
    assert "style" in [row[0] for row in measured(b'"""Doc."""\nfrom a import b\n').linted.findings]


def test_a_private_file_owes_no_docstring():
    """The name decides."""
    assert not measured(b"x = 1\n", "_a.py").linted.findings
    assert measured(b"x = 1\n", "a.py").linted.findings


def test_many_files_are_shared_out_to_processes():
    """The result is the same as in one."""
    contents = {str(n): f"def f{n}(a):\n    return a + {n}\n".encode() for n in range(310)}
    names = dict.fromkeys(contents, "a.py")
    many, one = (measure.measure(contents, names, processes) for processes in (2, 1))
    assert list(many) == list(one)
    assert all(many[key].functions == one[key].functions for key in contents)
    assert all(many[key].linted == one[key].linted for key in contents)


@pytest.mark.parametrize("content", [b"", b"x = 1\n" * 3, b"class A:\n  def f(self): pass\n"])
def test_every_function_has_both_complexities(content):
    """By the line of `def` and by the first line."""
    found = measured(content)
    assert set(found.linted.cyclomatic) >= {function.line for function in found.functions}
    assert set(found.cognitive) >= {function.first for function in found.functions}


def test_a_missing_tool_is_named(monkeypatch):
    """With the command that installs it; a tool's absence never passes."""
    monkeypatch.setitem(sys.modules, "complexipy", None)
    with pytest.raises(MachineError, match=r"needs complexipy.*entrenar\[quality\]"):
        measured(b"x = 1\n")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(shutil, "which", {}.get)
    with pytest.raises(MachineError, match=r"needs ruff.*entrenar\[quality\]"):
        measured(b"x = 1\n")


def test_a_tool_that_fails_is_no_clean_file(monkeypatch):
    """Ruff without output is an error, not a file without findings."""
    monkeypatch.setattr(lint, "_ruff", lambda: "/bin/false")
    monkeypatch.setattr(lint, "version", lambda: "0")
    with pytest.raises(MachineError, match="ruff 0 failed"):
        measured(b"x = 1\n")


def test_the_scorer_names_all_that_a_score_depends_on():
    """Formula, tools and grammar."""
    assert set(measure.scorer()) == {"formula", "ruff", "complexipy", "python"}
    assert lint.version() == importlib.metadata.version("ruff")


def test_a_fault_is_told_with_its_line():
    """The syntax error's."""
    assert measured(b"x = 1\ny = = 2\n") == Unmeasured("syntax error: invalid syntax", 2)

"""A small project with a test that notices half of its mutants."""

from pathlib import Path

import pytest

SOURCE = '''"""Arithmetic."""


def double(x):
    return x * 2


def clipped(x, most):
    if x > most:
        return most
    return x
'''
TESTS = """from toy import clipped, double


def test_double():
    assert double(3) == 6


def test_clipped():
    assert clipped(1, 5) == 1
"""
BETTER = """

def test_clipped_above():
    assert clipped(9, 5) == 5
"""


@pytest.fixture
def toy(tmp_path) -> Path:
    """The root of the project."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "toy.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    return tmp_path

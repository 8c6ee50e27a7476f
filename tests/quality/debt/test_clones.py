"""Repeated code: planted copies are found, in one file or two, with other names; tables and imports are none."""

import ast

import pytest

from entrenar.quality.debt import clones

from .planted import CLONE

NAMES = {"name": "walk", "one": "items", "two": "weight", "total": "sum_", "item": "entry"}
COPY = CLONE.format(**NAMES)
RENAMED = CLONE.format(name="stroll", one="rows", two="factor", total="result", item="row")
OTHER = '''

def different(rows, factor):
    """Do something else."""
    with open(rows) as stream:
        lines = [line.strip().split(",") for line in stream if line and not line.startswith("#")]
    return {key: [float(value) * factor for value in values] for key, *values in lines}
'''


def found(**files):
    windows = {}
    for name, text in files.items():
        windows[name] = clones.read_tokens(text, ast.parse(text))[0]
    return clones.find(windows)


@pytest.mark.parametrize("second", [COPY, RENAMED, COPY.replace("    ", "\t"), COPY.replace('"""Walk', '"""Stroll')])
def test_a_copy_in_another_file_is_found(second):
    """Other names, other layout and another docstring do not hide it; both files say where the other is."""
    both = found(a=OTHER + COPY, b=second)
    for name, twin in (("a", "b"), ("b", "a")):
        (clone,) = both[name]
        assert clone.tokens > 100
        assert clone.twin == twin
    (clone,) = both["a"]
    assert (clone.line, clone.end) == (10, 17)
    assert clone.twin_line == 3


def test_a_copy_in_the_same_file_is_found():
    """The first and the second place name each other."""
    first, second = found(a=COPY + RENAMED)["a"]
    assert (first.twin_line, second.twin_line) == (second.line, first.line)


def test_different_code_is_no_clone():
    """Two functions that share nothing."""
    assert found(a=COPY, b=OTHER) == {"a": [], "b": []}


@pytest.mark.parametrize(
    "text",
    [
        f"TABLE = ({', '.join(['0, 1'] * 90)})\nTWIN = ({', '.join(['0, 1'] * 90)})\n",
        "".join(f"import package{n}.inner as short{n}, other{n}\n" for n in range(40)) * 2,
        "".join(f"add('--flag{n}', type=int, default={n}, help='the {n}th flag')\n" for n in range(40)),
        'X = """' + "many words of prose. " * 90 + '"""\n' + "# the same comment\n" * 90,
    ],
    ids=["table", "imports", "calls with other arguments", "prose"],
)
def test_what_only_looks_alike_is_no_clone(text):
    """Tables, imports, calls of one function with other arguments, text."""
    assert found(a=text)["a"] == []


def test_short_repetition_is_no_clone():
    """Fewer tokens than a window repeat."""
    short = "def f{n}(a):\n    return sorted(a)[0] + max(a)\n"
    assert found(a=short.replace("{n}", "1") + short.replace("{n}", "2"))["a"] == []


def test_windows_that_overlap_themselves_are_no_clone():
    """A statement repeated a few times covers less than two windows."""
    assert found(a="if x and not y:\n    print(len(y))\n" * 5)["a"] == []
    assert found(a="if x and not y:\n    print(len(y))\n" * 12)["a"]


def test_nothing_is_found_in_nothing():
    """No files, and files without tokens."""
    assert clones.find({}) == {}
    assert found(a="", b="x = 1\n") == {"a": [], "b": []}


def test_code_lines_are_counted_without_prose():
    """Docstrings, comments and blanks are no code; a string that is used is."""
    text = '"""Doc\n\nstring."""\n\n# why\nx = 1  # what\ny = """a\nb"""\nz = f"""{x}\n{y}"""\n'
    assert clones.read_tokens(text, ast.parse(text))[1] == {6, 7, 8, 9, 10}


def test_an_f_string_is_one_token():
    """The same windows whatever Python's tokenizer makes of it."""
    text = "x = f'a{b!r:>{c}}d' + f\"{e}\"\n"
    assert len(clones.read_tokens(text, ast.parse(text))[0].lines) == 5

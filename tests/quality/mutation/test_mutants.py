"""Every operator makes its slip, and nothing else is touched."""

import textwrap

import pytest

from entrenar.quality.mutation.mutants import MutableFile


def mutated(body: str) -> set[tuple[str, str, str]]:
    source = f"def f(x, y, n, mask):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    file = MutableFile(source, "planted.py")
    for site in file.sites:
        file.code_with(site)  # each must compile
    return {(site.mutant.operator, site.mutant.before, site.mutant.after) for site in file.sites}


@pytest.mark.parametrize(
    ("body", "operator", "before", "after"),
    [
        ("return x * n", "drop right operand", "x * n", "x"),  # the missing scale factor
        ("return x * n", "drop left operand", "x * n", "n"),
        ("return x - y", "drop left operand", "x - y", "-y"),
        ("return x + y", "other arithmetic", "x + y", "x - y"),
        ("return x @ y", "exchange operands", "x @ y", "y @ x"),
        ("return x.mT", "drop transpose", "x.mT", "x"),
        ("return x.transpose(1, 2)", "drop call", "x.transpose(1, 2)", "x"),
        ("return x.detach()", "drop call", "x.detach()", "x"),
        ("return torch.abs(x)", "drop call", "torch.abs(x)", "x"),
        ("return sorted(x)", "drop call", "sorted(x)", "x"),
        ("return x.sum(-1)", "other function", "x.sum(-1)", "x.mean(-1)"),
        ("return min(x, y)", "other function", "min(x, y)", "max(x, y)"),
        ("return torch.where(mask, x, y)", "exchange operands", "torch.where(mask, x, y)", "torch.where(mask, y, x)"),
        ("return x.sum(dim=1, keepdim=True)", "drop keyword", "x.sum(dim=1, keepdim=True)", "x.sum(dim=1)"),
        ("return -x", "drop sign or not", "-x", "x"),
        ("return x < y", "other comparison", "x < y", "x <= y"),
        ("return 0 <= x < y", "other comparison", "0 <= x < y", "0 <= x <= y"),
        ("return x and y", "and for or", "x and y", "x or y"),
        ("return True", "other truth value", "True", "False"),
        ("return x[7]", "constant off by one", "7", "6"),
        ("return x[7]", "constant off by one", "7", "8"),
        ("return x if mask else y", "always the second", "x if mask else y", "y"),
        ("return x[n:y]", "drop lower bound", "n:y", ":y"),
        ("return [i for i in x if i]", "drop filter", "[i for i in x if i]", "[i for i in x]"),
        ("x += y\nreturn x", "drop statement", "x += y", "pass"),
        ("x += y\nreturn x", "assign for update", "x += y", "x = y"),
        ("x[0] = y", "drop statement", "x[0] = y", "pass"),
        ("x.append(y)", "drop statement", "x.append(y)", "pass"),
        ("if mask:\n    return x", "never", "if mask", "if False"),
        ("for i in x:\n    break", "break for continue", "break", "continue"),
        ("return x, y", "zero a result", "return (x, y)", "return (x * 0, y)"),
    ],
)
def test_an_operator_makes_its_slip(body, operator, before, after):
    """The change is among the mutants, under its name."""
    assert (operator, before, after) in mutated(body)


@pytest.mark.parametrize(
    "body",
    [
        '"""Text of 3 words."""',
        "raise ValueError(f'{x + 1} is wrong')",
        "assert x > 1, 'why'",
        "y: list[1] = x",
        "logger.info('%d', x + 1)",
        "z = f'{x + 1}'",
        "return isinstance(x, int)",
        "super().__init__()",
        "return list(map(x, y, strict=True))",
    ],
)
def test_messages_types_and_assertions_are_left_alone(body):
    """What is no arithmetic has no mutant."""
    assert mutated(body) == set()


def test_decorators_defaults_and_module_level_are_left_alone():
    """Only the insides of functions are mutated, decorated or not."""
    source = "LIMIT = 3\n\n@cached(2)\ndef f(x: int = 4) -> int:\n    return x + LIMIT\n"
    file = MutableFile(source, "planted.py")
    assert {site.mutant.before for site in file.sites} == {"x + LIMIT"}


def test_planting_changes_one_function_and_is_undone():
    """The mutated code computes otherwise; compiled again without it, the file is as before."""
    source = "class C:\n    @staticmethod\n    def f(x):\n        return x * 3\n"
    file = MutableFile(source, "planted.py")
    site = next(site for site in file.sites if site.mutant.operator == "drop right operand")
    namespace: dict = {}
    exec(source, namespace)  # noqa: S102 - the source is written above
    function = namespace["C"].f
    assert function(5) == 15
    function.__code__ = file.code_with(site)
    assert function(5) == 5
    other = next(site for site in file.sites if site.mutant.after == "4")
    function.__code__ = file.code_with(other)
    assert function(5) == 20


def test_names_hold_when_lines_move_and_differ_when_slips_are_equal():
    """A mutant is found again after an edit above it; two equal slips of one line are two mutants."""
    source = "def f(x):\n    return x[1] + x[1]\n"
    names = [site.mutant.name for site in MutableFile(source, "planted.py").sites]
    moved = [site.mutant.name for site in MutableFile(f"import math\n\n\n{source}", "planted.py").sites]
    assert names == moved
    assert len(names) == len(set(names))


def test_a_nested_function_is_changed_through_its_outermost():
    """The code exchanged is that of the outermost function, the name shown that of the inner one."""
    source = "def outer(x):\n    def inner(y):\n        return y + 1\n    return inner(x)\n"
    file = MutableFile(source, "planted.py")
    assert {(site.outer_function, site.mutant.function) for site in file.sites} == {("outer", "outer.inner")}
    namespace: dict = {}
    exec(source, namespace)  # noqa: S102
    namespace["outer"].__code__ = file.code_with(next(s for s in file.sites if s.mutant.after == "2"))
    assert namespace["outer"](1) == 3

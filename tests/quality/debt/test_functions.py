"""Functions and classes: their names, extent, nesting, parameters."""

import ast
import textwrap

import pytest

from entrenar.quality.debt.functions import outline


def outlined(text):
    text = textwrap.dedent(text)
    return outline(ast.parse(text), set(range(1, text.count("\n") + 1)))


def test_functions_are_found_wherever_they_stand():
    """In classes, under conditions, in handlers; a function inside a function belongs to it."""
    functions, classes = outlined("""
        if x:
            def conditional(): ...
        try:
            def tried(): ...
        except E:
            async def handled(): ...
        class Outer:
            class Inner:
                @decorated(
                    1
                )
                def method(self):
                    def nested(): ...
        match x:
            case 1:
                def matched(): ...
    """)
    names = ["conditional", "tried", "handled", "Outer.Inner.method", "matched"]
    assert [function.name for function in functions] == names
    assert [(row.name, row.methods) for row in classes] == [("Outer", 0), ("Outer.Inner", 1)]
    method = functions[3]
    assert (method.first, method.line, method.end, method.length) == (10, 13, 14, 2)


@pytest.mark.parametrize(
    ("body", "depth"),
    [("pass", 0), ("if a: pass", 1), ("if a: pass\n elif b: pass\n elif c: pass", 1),
     ("for a in b:\n  while c:\n   with d: pass", 3), ("try:\n  if a: pass\n except E:\n  for b in c: pass", 2),
     ("if a: pass\n else:\n  if b: pass\n  x = 1", 2), ("x = [a for a in b if a]", 0),
     ("match a:\n  case 1:\n   if b: pass", 2), ("def inner():\n  if a:\n   if b: pass", 0)],
)  # fmt: skip
def test_nesting_counts_blocks_in_blocks(body, depth):
    """`elif` nests no deeper; comprehensions and inner functions do not count."""
    (function,), _ = outlined(f"def f():\n {body}\n")
    assert function.nesting == depth


@pytest.mark.parametrize(
    ("signature", "count"),
    [("", 0), ("self", 0), ("cls, a", 1), ("a, /, b, *, c", 3), ("*a, **b", 2), ("a, self", 2)],
)
def test_parameters_are_counted_without_the_bound_one(signature, count):
    """`self` and `cls` in the first place are no parameters."""
    (function,), _ = outlined(f"def f({signature}): ...\n")
    assert function.parameters == count

"""The functions and classes of a file, and what their own text says of them: length, nesting, parameters."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
_OWN_SCOPE = (*_FUNCTIONS, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True)
class Function:
    """A function that lies in no other one; what it contains belongs to it."""

    name: str
    first: int  # the first decorator's line
    line: int
    end: int
    length: int
    nesting: int
    parameters: int


@dataclass(frozen=True)
class Class:
    """A class, and how many methods it defines."""

    name: str
    line: int
    end: int
    methods: int


def outline(tree: ast.Module, code: set[int]) -> tuple[list[Function], list[Class]]:
    """Return the outermost functions and the classes of a file, of which `code` are the lines of code."""
    functions: list[Function] = []
    classes: list[Class] = []
    for node, prefix in _definitions(tree, ""):
        name, end = prefix + node.name, node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(child, _FUNCTIONS) for child in node.body)
            classes.append(Class(name, node.lineno, end, methods))
        else:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = sum(line in code for line in range(node.lineno, end + 1))
            functions.append(Function(name, first, node.lineno, end, length, _nesting(node), _parameters(node)))
    return functions, classes


def _definitions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            yield child, prefix
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (*_BLOCKS, ast.ExceptHandler, ast.match_case)):
            yield from _definitions(child, prefix)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args]
    is_bound = bool(named) and named[0].arg in ("self", "cls", "mcs")
    return len(named) - is_bound + len(given.kwonlyargs) + (given.vararg is not None) + (given.kwarg is not None)


def _nesting(node: ast.AST, depth: int = 0) -> int:
    """Return how deep blocks lie in each other; an `elif` is on the level of its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.expr, _OWN_SCOPE)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inner = depth + (isinstance(child, _BLOCKS) and not is_elif)
        deepest = max(deepest, _nesting(child, inner))
    return deepest

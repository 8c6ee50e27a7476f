"""Copies of a module with its source changed: the same text, compiled anew, with an error planted.

A check that passes on such a copy as it does on the module has not looked at the line that was changed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType


def changed(source: str, old: str, new: str, count: int = 1) -> str:
    """Replace one text of a source; it must be there exactly `count` times, so that a moved line is noticed."""
    found = source.count(old)
    assert found == count, f"the mutant's text stands {found} times in the source, not {count}: {old!r}"
    return source.replace(old, new)


def op_module(op: str) -> str:
    """Return the module of an operation: its own name, but for the one that has a package of its own."""
    return f"entrenar.ops.{ {'quantized_linear': 'quantized.linear'}.get(op, op) }"


def source_of(name: str) -> str:
    """Return the source of an importable module."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def compiled(name: str, source: str) -> ModuleType:
    """Run a source as a module of its own, beside the one it was taken from."""
    module = ModuleType(f"{name}_copy")
    sys.modules[module.__name__] = module  # where dataclasses and typing look a class's module up
    exec(compile(source, f"<{name}, changed>", "exec"), module.__dict__)  # noqa: S102 - a test's own copy
    return module


def mutant(name: str, *changes: tuple[str, str]) -> ModuleType:
    """Return a copy of a module with texts replaced; without changes a copy of what it is."""
    source = source_of(name)
    for old, new in changes:
        source = changed(source, old, new)
    return compiled(name, source)


def functions_of(module: ModuleType) -> dict[str, FunctionType]:
    """Return the functions and methods that a module defines, by qualified name."""
    found: dict[str, FunctionType] = {}

    def look(value: object) -> None:
        value = getattr(value, "__wrapped__", value)
        for part in ("__func__", "fget"):
            value = getattr(value, part, None) or value
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            found[value.__code__.co_qualname] = value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for inner in vars(value).values():
                look(inner)

    for value in vars(module).values():
        look(value)
    return found


def codes_of(code: CodeType) -> dict[str, CodeType]:
    """Return the code of a module's functions, by qualified name."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {part.co_qualname: part for part in inner} | {k: v for part in inner for k, v in codes_of(part).items()}


@contextmanager
def planted(name: str, old: str, new: str) -> Iterator[None]:
    """Exchange the code of a living module's functions for that of its changed source, for as long as this lasts.

    Whoever holds one of the functions runs the changed code: nothing is imported anew.
    """
    module = importlib.import_module(name)
    source = source_of(name)
    was, now = (codes_of(compile(text, f"<{name}>", "exec")) for text in (source, changed(source, old, new)))
    functions = functions_of(module)
    differing = {key: functions[key] for key, code in now.items() if key in functions and code != was.get(key)}
    assert differing, f"the change is in no function of {name}: {old!r}"
    kept = {key: function.__code__ for key, function in differing.items()}
    try:
        for key, function in differing.items():
            function.__code__ = now[key]
        yield
    finally:
        for key, function in differing.items():
            function.__code__ = kept[key]

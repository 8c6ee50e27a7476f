"""Copies of a module with its source changed: the same text, compiled anew, with an error planted.

A check that passes on such a copy as it does on the module has not looked at the line that was changed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def changed(source: str, old: str, new: str, count: int = 1) -> str:
    """Replace one text of a source; it must be there exactly `count` times, so that a moved line is noticed."""
    found = source.count(old)
    assert found == count, f"the mutant's text stands {found} times in the source, not {count}: {old!r}"
    return source.replace(old, new)


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

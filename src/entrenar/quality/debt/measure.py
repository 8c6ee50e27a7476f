"""Measure single files: what can be known of a file from its own text, so that it can be kept by its blob's hash."""

import ast
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import ModuleType

from entrenar.errors import DataError, MachineError
from entrenar.quality.debt import clones, formula, lint
from entrenar.quality.debt.functions import Class, Function, outline
from entrenar.quality.debt.imports import Import, imports_of
from entrenar.quality.debt.sources import decode, is_generated

_MANY = 300  # files from which on a second process pays for its start
_CHUNK = 16


@dataclass(frozen=True)
class Measured:
    """One file as measured; `cyclomatic` and `cognitive` are by the functions' first lines, 0 is the top level."""

    functions: tuple[Function, ...]
    classes: tuple[Class, ...]
    code_lines: int
    cognitive: dict[int, int]
    imports: tuple[Import, ...]
    windows: clones.Windows
    linted: lint.Linted


@dataclass(frozen=True)
class Unmeasured:
    """A file without a score, and why. A generated file is passed over; any other fault leaves a gap."""

    reason: str
    line: int = 1
    is_generated: bool = False


Found = Measured | Unmeasured


@dataclass(frozen=True)
class _Parsed:
    text: str
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]
    code_lines: int
    cognitive: dict[int, int]
    imports: tuple[Import, ...]
    windows: clones.Windows


def scorer() -> dict[str, str]:
    """Return the versions of all that a score depends on: the formula, the tools, and Python's grammar."""
    return {
        "formula": str(formula.VERSION),
        "ruff": lint.version(),
        "complexipy": importlib.metadata.version(_complexipy().__name__),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def _complexipy() -> ModuleType:
    try:
        return importlib.import_module("complexipy")
    except ModuleNotFoundError as missing:
        raise MachineError("the score needs complexipy, which is missing; pip install 'entrenar[quality]'") from missing


def measure(contents: Mapping[str, bytes], names: Mapping[str, str], processes: int) -> dict[str, Found]:
    """Measure files given by a key; `names` are their file names: they decide which names are public.

    Raises: MachineError if a tool is missing or fails.
    """
    keys = list(contents)
    if processes > 1 and len(keys) >= _MANY:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            rows = list(pool.map(_parse, contents.values(), chunksize=_CHUNK))
    else:
        rows = [_parse(content) for content in contents.values()]
    parsed = {key: row for key, row in zip(keys, rows, strict=True) if isinstance(row, _Parsed)}
    linted = lint.lint({key: row.text for key, row in parsed.items()}, names)
    found: dict[str, Found] = {}
    for key, row in zip(keys, rows, strict=True):
        if isinstance(row, Unmeasured):
            found[key] = row
        else:
            found[key] = Measured(
                row.functions, row.classes, row.code_lines, row.cognitive, row.imports, row.windows, linted[key]
            )
    return found


def _parse(content: bytes) -> _Parsed | Unmeasured:
    try:
        text = decode(content)
        if is_generated(text):
            return Unmeasured("generated: its first lines say that a program wrote it", is_generated=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in someone's string
            tree = ast.parse(text)
        cognitive = _cognitive(text)
        windows, code = clones.read_tokens(text, tree)
        functions, classes = outline(tree, code)
        imports = tuple(imports_of(tree))
    except SyntaxError as fault:
        return Unmeasured(f"syntax error: {fault.msg}", fault.lineno or 1)
    except DataError as fault:
        return Unmeasured(str(fault))
    except (ValueError, RecursionError, MemoryError) as fault:
        return Unmeasured(f"cannot be parsed: {fault or type(fault).__name__}")
    return _Parsed(text, tuple(functions), tuple(classes), len(code), cognitive, imports, windows)


def _cognitive(text: str) -> dict[int, int]:
    """Return the cognitive complexity of each function by its first line, and of the top level at 0."""
    found = _complexipy().code_complexity(text, check_script=True, no_ignore=True, with_plans=False)
    return {0 if row.name == "<module>" else row.line_start: row.complexity for row in found.functions}

"""The structure of the package in figures: cycles, sizes, nesting, imports past a package's front door.

    python -m tests.house              the working tree
    python -m tests.house REVISION     any commit, read from git

`test_architecture.py` holds the limits; this page only measures, from the syntax trees alone.
"""

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "entrenar"
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function's place and sizes; lines do not count its docstring, parameters do not count self and cls."""

    name: str
    line: int
    lines: int
    parameters: int
    nesting: int


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name below the package, its tree, and what it imports at run time and for types."""

    path: Path
    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.source)

    @property
    def package(self) -> str:
        """The package, or the module on the top level, that the file belongs to."""
        return self.name.split(".")[0]

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yield each dotted name below the package that the file imports, with the line."""
        for node in ast.walk(self.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
            for name in names:
                if name.startswith(f"{PACKAGE}."):
                    yield name.removeprefix(f"{PACKAGE}."), node.lineno

    def functions(self) -> Iterator[Function]:
        for node in ast.walk(self.tree):
            if isinstance(node, _FUNCTIONS):
                prose = len((ast.get_docstring(node, clean=False) or "").splitlines())
                own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = sum(argument.arg not in ("self", "cls") for argument in own)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1 - prose
                yield Function(node.name, node.lineno, lines, parameters, _nesting(node))

    def code_lines(self) -> int:
        return len(code_lines(self.source))


def modules(source: Path = ROOT / "src" / PACKAGE) -> list[Module]:
    """Return every module but the package's own `__init__`, in order of path."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name != "__init__":
            stub = path.with_suffix(".pyi")  # the imports of a package whose names are loaded on first use
            files = [path, *([stub] if stub.is_file() else [])]
            found.append(Module(path, name, "\n".join(file.read_text(encoding="utf-8") for file in files)))
    return found


def code_lines(source: str) -> set[int]:
    """Return the lines that hold code: no blanks, no comments, no docstrings, which a budget must not discourage."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in no_code for line in range(token.start[0], token.end[0] + 1)}
    return lines - docstrings


def _nesting(node: ast.AST, depth: int = 0) -> int:
    """Return how many blocks stand inside each other; `elif` counts as its `if`, a nested function begins anew."""
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
                continue
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and field == "orelse" and len(value) == 1
            inner = depth + (isinstance(child, _BLOCKS) and not is_elif)
            deepest = max(deepest, _nesting(child, inner))
    return deepest


def import_graph(found: list[Module], *, level: str) -> dict[str, set[str]]:
    """Return who imports whom, among modules ("module") or among packages ("package")."""
    names = {module.name for module in found}
    packages = {module.name for module in found if module.path.name == "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module in found:
        own = module.package if level == "package" else module.name
        edges = graph.setdefault(own, set())
        for name, _ in module.imports():
            target = name if name in names else name.rpartition(".")[0]
            if target not in names or (level == "module" and target in packages and module.name.startswith(target)):
                continue
            edges.add(target.split(".")[0] if level == "package" else target)
        edges.discard(own)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def past_the_front_door(found: list[Module]) -> list[str]:
    """Return the imports of another package's inner module where the package's `__init__` exports the same name."""
    exported = {module.name: set(_all(module.tree)) for module in found if module.path.name == "__init__.py"}
    return [
        f"{module.name}:{line} {name}"
        for module in found
        for name, line in module.imports()
        if name.split(".")[0] != module.package
        and name.count(".") > 1
        and name.rpartition(".")[2] in exported.get(name.split(".")[0], set())
    ]


def _all(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def figures(source: Path) -> dict[str, object]:
    """Return the table that is compared before and after a move."""
    found = modules(source)
    functions = [function for module in found for function in module.functions()]
    return {
        "modules": len(found),
        "code lines": sum(module.code_lines() for module in found),
        "import cycles among packages": cycles(import_graph(found, level="package")),
        "import cycles among modules": cycles(import_graph(found, level="module")),
        "files over 350 lines": sum(len(module.source.splitlines()) > 350 for module in found),
        "functions over 40 lines": sum(function.lines > 40 for function in functions),
        "functions over 6 parameters": sum(function.parameters > 6 for function in functions),
        "functions nested deeper than 3": sum(function.nesting > 3 for function in functions),
        "imports past a package's __init__": len(past_the_front_door(found)),
        "largest folder": max(
            (len(list(folder.glob("*.py"))), str(folder.relative_to(source)))
            for folder in [source, *source.rglob("*")]
            if folder.is_dir()
        ),
    }


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = ROOT
        if arguments:
            archive = subprocess.run(["git", "archive", arguments[0], "src"], cwd=ROOT, capture_output=True, check=True)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(scratch, filter="data")
            source = Path(scratch)
        for name, value in figures(source / "src" / PACKAGE).items():
            print(f"{name:<36}{value}")  # noqa: T201 - the page is also a command


if __name__ == "__main__":
    main(sys.argv[1:])

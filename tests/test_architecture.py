"""The house keeps its shape: who imports whom, how large rooms may grow, what is public, what starts fast."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "entrenar"
MAX_FILE_LINES = 400
MAX_SRC_CODE_LINES = 26_000

# Imports run downwards only: a package may import those of lower floors, never its own floor or a higher one.
FLOORS = {
    "errors": 0, "files": 0, "stats": 0, "runs": 0,
    "ops": 1, "data": 1, "train": 1, "trace": 1, "quality": 1, "report": 1,
    "model": 2, "peft": 2,
    "interop": 3, "infer": 3, "quantize": 3, "scale": 3,
    "config": 4, "config_file": 4,
    "planning": 5,
    "recipe": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
# The ground floor is one room: files raises the errors.
SAME_FLOOR = {("files", "errors"), ("runs", "errors"), ("config_file", "config")}
STANDARD_LIBRARY_ONLY = ("errors", "files", "stats", "runs")

PUBLIC = {
    "ops": {"Documents", "attention", "fastest_compute_dtype", "linear", "linear_cross_entropy", "rms_norm", "rope",
            "swiglu"},
    "model": {"KVCache", "Llama", "LlamaConfig"},
    "data": {"Batch", "Corpus", "Loader", "LoaderState", "Tokenizer", "prepare", "validation_batches"},
    "train": {"OptimConfig", "ScheduleConfig", "TrainConfig", "build_optimizer", "fit", "latest_good"},
    "infer": {"GenerateConfig", "complete", "evaluate", "generate", "stream"},
    "interop": {"load_model", "read_config", "save_model"},
}  # fmt: skip


def module_of(path: Path) -> str:
    """Return the package, or the module on the top level, that a file belongs to."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py") if path.parent != SRC or path.name != "__init__.py")


def imported_packages(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each package of entrenar that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module == "entrenar":
                names = [f"entrenar.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        for name in names:
            parts = name.split(".")
            if parts[0] == "entrenar" and len(parts) > 1:
                yield parts[1], node.lineno


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_downwards(path):
    """No file imports its own floor or a higher one."""
    own = module_of(path)
    for other, line in imported_packages(path):
        if other == own or (own, other) in SAME_FLOOR:
            continue
        assert FLOORS[other] < FLOORS[own], f"{path.relative_to(SRC)}:{line}: {own} may not import {other}"


def test_the_floor_check_sees_a_violation(tmp_path):
    """A planted upward import is found."""
    planted = tmp_path / "planted.py"
    planted.write_text("from entrenar import recipe\nimport entrenar.cli.main\nfrom entrenar.train import fit\n")
    assert [name for name, _ in imported_packages(planted)] == ["recipe", "cli", "train"]


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_ground_floor_needs_the_standard_library_only(name):
    """Floor 0 imports no third party."""
    for node in ast.walk(ast.parse((SRC / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module is not None
            root = module.split(".")[0]
            assert root == "entrenar" or root in sys.stdlib_module_names, f"{name}.py imports {root}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_stays_small_enough_to_know(path):
    """No file grows past the budget."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{path.relative_to(SRC)} has {lines} lines"


def code_lines(source: str) -> set[int]:
    """The lines that hold code: no blanks, no comments, no docstrings, which the budget must not discourage."""
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


def test_code_lines_are_counted_without_prose():
    """A docstring, a comment and a blank line are no code."""
    assert code_lines('"""Doc\n\nstring."""\n\n# why\nx = 1  # what\ny = """a\nb"""\n') == {6, 7, 8}


def test_the_whole_stays_small_enough_to_know():
    """All of src stays within its budget of code."""
    assert sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in sources()) <= MAX_SRC_CODE_LINES


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_the_public_names_are_there(package):
    """What users import is exported by name."""
    module = __import__(f"entrenar.{package}", fromlist=["__all__"])
    assert set(module.__all__) >= PUBLIC[package]
    assert all(hasattr(module, name) for name in module.__all__)


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing():
    """`import entrenar` brings no part of it and no torch."""
    loaded = _loaded_by("import entrenar")
    assert "torch" not in loaded
    assert not any(name.startswith("entrenar.") for name in loaded)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["no-such-command"]])
def test_the_front_door_does_not_load_torch(words):
    """Help, version and a wrong command answer at once."""
    assert "torch" not in _loaded_by(f"from entrenar.cli.main import main\nmain({words!r})")


def test_only_the_command_line_prints():
    """`print` is called in cli alone."""
    for path in sources():
        if module_of(path) in ("cli", "__main__"):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path

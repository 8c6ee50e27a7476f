"""The house keeps its shape: who imports whom, how large rooms may grow, what is public, what starts fast."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from entrenar.cli.main import COMMANDS

from .house import Module, code_lines, cycles, import_graph, modules, past_the_front_door

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src" / "entrenar"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_PARAMETERS = 6
MAX_NESTING = 3

# Imports run downwards only: a package may import those of lower floors, never its own floor or a higher one.
FLOORS = {
    "errors": 0, "version": 0, "files": 0, "locks": 0, "stats": 0, "runs": 0, "synonyms": 0, "lazy": 0, "memory": 0,
    "arguments": 0, "options": 0,
    "ops": 1, "data": 1, "train": 1, "trace": 1, "quality": 1, "report": 1,
    "model": 2, "peft": 2, "notebook": 2,
    "interop": 3, "infer": 3, "quantize": 3, "scale": 3,
    "config": 4, "config_file": 5,
    "planning": 5,
    "recipe": 6,
    "cli": 7, "api": 7, "__main__": 8,
}  # fmt: skip
# The ground floor is one room: its modules raise the errors, and a run's records are written as files.
SAME_FLOOR = {
    ("files", "errors"),
    ("runs", "errors"),
    ("runs", "files"),
    ("locks", "errors"),
    ("locks", "files"),
    ("memory", "errors"),
}
STANDARD_LIBRARY_ONLY = ("errors", "version", "files", "locks", "stats", "runs", "synonyms", "lazy", "memory")

# Lines of code, without docstrings, comments and blanks. Raise a number in the commit that needs it, and say why.
BUDGETS = {
    "ops": 2200, "model": 1100, "peft": 1500, "quantize": 600, "data": 4400, "train": 3050, "interop": 3600,
    "infer": 900,
    "planning": 1500, "recipe": 1700, "trace": 6000, "quality": 5000, "report": 1500, "scale": 1200, "cli": 4000,
    "errors": 80, "version": 5, "files": 220, "locks": 60, "stats": 60, "runs": 160, "synonyms": 40, "config": 170,
    "lazy": 40, "memory": 90,
    "config_file": 300, "api": 160, "arguments": 40, "options": 160, "notebook": 60,
    "__main__": 5,
}  # fmt: skip

# An op takes the operands of its equation, and its Function passes them on.
PARAMETERS_OF = {"ops": 9}

# Functions past a limit, and why.
TOO_LARGE = {
    "data.corpus.loader": "a loader's options are keywords, each a key of the config",
    "data.sft.loader": "a loader's options are keywords, each a key of the config",
    "trace.provider": "OpenTelemetry's signature of start_span",
    "trace.spool": "the fields of a record in the file, in its order",
}

# Modules that no test imports and that have no test file of their name: where they are tested. A package stands for
# the modules in it.
TESTED_BY = {
    "version": "test_deployment.py",
    "__main__": "test_errors.py",
    "cli.convert": "interop/test_convert.py",
    "cli.evaluate": "recipe/test_pretrain.py",
    "cli.quality": "cli/quality/test_debt.py",
    "cli.trace": "cli/trace/test_run.py",
    "cli.streams": "cli/test_main.py",
    "cli.train": "recipe/test_pretrain.py",
    "cli.verify": "quality/test_certificate.py",
    "cli.spans": "cli/trace/test_run.py",
    "data.json_rows": "data/test_rows.py",
    "data.corpus.document_encoder": "data/corpus/test_prepare.py",
    "data.settings": "test_config.py",
    "data.table_rows": "data/test_rows.py",
    "data.sft.answer_spans": "data/sft/test_encode.py",
    "data.sft.settings": "data/sft/test_examples.py",
    "interop.gguf_metadata": "interop/test_gguf.py",
    "interop.peft_keys": "interop/test_hf_peft.py",
    "cli.replay": "recipe/test_replay.py",
    "infer.settings": "infer/test_generate.py",
    "interop.formats": "interop/test_convert.py",
    "interop.proof.piece_encoder": "interop/test_convert.py",
    "model.batch_loss": "recipe/test_pretrain.py",
    "model.hf_config": "interop/test_hf.py",
    "ops.first_order": "ops/test_op_contract.py",
    "ops.quantized.kinds": "ops/quantized/test_protocol.py",
    "peft.trunk_config": "peft/test_trunk.py",
    "peft.trainable": "peft/test_lora.py",
    "options": "test_docs.py",
    "planning": "planning/test_rehearsal.py",
    "quality.chaos": "quality/chaos/test_chaos.py",
    "quality.debt.report": "cli/quality/test_debt.py",
    "quality.figures": "quality/test_gate.py",
    "quality.history": "quality/history/test_history.py",
    "quality.mutation.worker": "quality/mutation/test_verdicts.py",
    "quality.prompts": "quality/test_prompts.py",
    "recipe": "recipe/test_finetune.py",
    "trace": "cli/trace/test_run.py",
    "train.keeper": "train/test_loop.py",
    "train.norms": "scale/test_exactness.py",
    "train.process": "test_config.py",
    "train.progress": "train/test_loop.py",
    "train.task": "train/test_loop.py",
}

# The public names of each package, exactly: what users import, and what other packages may.
PUBLIC: dict[str, list[str]] = tomllib.loads((TESTS / "public_names.toml").read_text(encoding="utf-8"))

MODULES = modules()
BY_NAME = {module.name: module for module in MODULES}
EACH = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


@EACH
def test_imports_run_downwards(module: Module):
    """No file imports its own floor or a higher one."""
    own = module.package
    for name, line in module.imports():
        other = name.split(".")[0]
        if other != own and (own, other) not in SAME_FLOOR:
            assert FLOORS[other] < FLOORS[own], f"{module.path}:{line}: {own} may not import {other}"


def planted(source: str) -> Module:
    """Return a module of the training loop's package that is never written."""
    return Module(SRC / "train" / "planted.py", "train.planted", source)


def test_an_upward_import_is_seen():
    """Every spelling of an import names its package."""
    source = "from entrenar import recipe\nimport entrenar.cli.main\nfrom entrenar.peft import merge\nimport torch\n"
    assert [name.split(".")[0] for name, _ in planted(source).imports()] == ["recipe", "cli", "peft"]


@pytest.mark.parametrize("level", ["package", "module"])
def test_nothing_imports_itself_in_a_circle(level):
    """No package and no module reaches itself through others, imports for types included."""
    assert cycles(import_graph(MODULES, level=level)) == []


def test_a_circle_is_seen():
    """A circle over three is found, a chain is none."""
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": {"c"}}) == []


def test_what_a_package_exports_is_imported_from_its_front():
    """Other packages do not reach past an `__init__` for a name that it exports."""
    assert past_the_front_door(MODULES) == []


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_the_ground_floor_needs_the_standard_library_only(name):
    """Floor 0 imports no third party."""
    for node in ast.walk(BY_NAME[name].tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module is not None
            root = module.split(".")[0]
            assert root == "entrenar" or root in sys.stdlib_module_names, f"{name}.py imports {root}"


@EACH
def test_a_file_and_its_functions_stay_small_enough_to_know(module: Module):
    """No file, function, parameter list or nesting grows past its limit."""
    lines = len(module.source.splitlines())
    assert lines <= MAX_FILE_LINES, f"{module.path} has {lines} lines"
    for function in module.functions() if module.name not in TOO_LARGE else ():
        place = f"{module.path}:{function.line} {function.name}"
        assert function.lines <= MAX_FUNCTION_LINES, f"{place} has {function.lines} lines"
        most = PARAMETERS_OF.get(module.package, MAX_PARAMETERS)
        assert function.parameters <= most, f"{place} has {function.parameters} parameters"
        assert function.nesting <= MAX_NESTING, f"{place} nests {function.nesting} deep"


@pytest.mark.parametrize("name", sorted(TOO_LARGE))
def test_an_exception_is_needed(name):
    """A module that keeps every limit leaves the list."""
    each = BY_NAME[name].functions()
    assert any(
        one.lines > MAX_FUNCTION_LINES or one.parameters > MAX_PARAMETERS or one.nesting > MAX_NESTING for one in each
    )


def test_sizes_are_measured_as_a_reader_counts():
    """Docstrings are free, `self` is no parameter, `elif` is no level, an inner function begins anew."""
    source = (
        "class A:\n"
        "    def f(self, a, *, b):\n"
        '        """Doc.\n\n        More.\n        """\n'
        "        if a:\n            pass\n        elif b:\n            for c in a:\n                pass\n"
        "        def g():\n            while a:\n                pass\n"
    )
    f, g = planted(source).functions()
    assert (f.lines, f.parameters, f.nesting) == (9, 2, 2)
    assert (g.lines, g.parameters, g.nesting) == (3, 0, 1)


def test_code_lines_are_counted_without_prose():
    """A docstring, a comment and a blank line are no code."""
    assert code_lines('"""Doc\n\nstring."""\n\n# why\nx = 1  # what\ny = """a\nb"""\n') == {6, 7, 8}


@pytest.mark.parametrize("package", sorted({module.package for module in MODULES}))
def test_a_package_stays_within_its_budget(package):
    """Each package has room for what it is for, and no more."""
    lines = sum(module.code_lines() for module in MODULES if module.package == package)
    assert lines <= BUDGETS[package], f"{package} has {lines} lines of code, its budget is {BUDGETS[package]}"


@cache
def named_by_tests() -> set[str]:
    """The modules that a test imports, or names in its first lines."""
    named: set[str] = set()
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entrenar"):
                named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        named |= {f"entrenar.{name}" for name in re.findall(r"`([a-z_0-9.]+)`", ast.get_docstring(tree) or "")}
    return named


def _entry(name: str) -> str | None:
    """Return the entry of a module, or of the package that it belongs to."""
    while name not in TESTED_BY and "." in name:
        name = name.rpartition(".")[0]
    return TESTED_BY.get(name)


@EACH
def test_a_module_has_a_test(module: Module):
    """Tests mirror src: a file of the module's name, a test that names the module, or an entry that says which."""
    path = module.path.relative_to(SRC)
    mirror = TESTS / path.parent / f"test_{path.name}"
    is_named = mirror.is_file() or f"entrenar.{module.name}" in named_by_tests()
    assert path.name == "__init__.py" or is_named or _entry(module.name), (
        f"no test has the name {mirror.relative_to(TESTS)} or imports entrenar.{module.name}; write one, or add "
        "the module to TESTED_BY"
    )


@pytest.mark.parametrize("name", sorted(TESTED_BY))
def test_an_entry_names_a_module_and_a_test(name):
    """No entry is stale."""
    assert name in BY_NAME
    assert (TESTS / TESTED_BY[name]).is_file()


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_the_public_names_are_exactly_these(package):
    """What users import is a list, and nothing is exported by accident."""
    module = importlib.import_module(f"entrenar.{package}")
    assert sorted(module.__all__) == sorted(PUBLIC[package])
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_package_with_exports_is_pinned():
    """A package that exports names has them on the list."""
    with_all = {module.name for module in MODULES if module.path.name == "__init__.py" and "__all__" in module.source}
    assert {name for name in with_all if "." not in name} == {name for name in PUBLIC if name != "entrenar"}


def test_the_package_is_typed():
    """`py.typed` is shipped, so that type checkers read the annotations (PEP 561)."""
    assert (SRC / "py.typed").is_file()


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing():
    """`import entrenar` brings no part of it but its version, and no torch."""
    loaded = _loaded_by("import entrenar")
    assert "torch" not in loaded
    assert {name for name in loaded if name.startswith("entrenar.")} == {"entrenar.version"}


FAST = [
    ["--help"],
    ["--version"],
    ["no-such-command"],
    *([command, "--help"] for command in COMMANDS),
    ["eval", "model"],
    ["train", "--lr", "fast"],
    ["train", "--learning-rates", "1"],
    ["finetune", "--model", "base"],
    ["quickstart", "--minutes", "-1"],
    ["prepare", "text"],
    ["generate", "model", "--temperature", "-1"],
    ["chat", "model", "--template", "no-such-file"],
    ["convert", "model", "out", "--to", "hf", "--bits", "4"],
    ["plan", "--preset", "huge"],
    ["config", "print", "--preset", "tiny"],
    ["doctor", "--json"],
    ["eval", "model", "--corpus", "corpus", "--learning-rate", "1"],
    ["eval", "model", "--corpus", "corpus", "--threads", "many"],
    ["merge", "base", "adapter"],
    ["merge", "base", "adapter", "out", "--dtyp", "float32"],
]


@pytest.mark.parametrize("words", FAST, ids=" ".join)
def test_the_front_door_does_not_load_torch(words):
    """Help, version, a wrong command and a wrong flag answer at once."""
    assert "torch" not in _loaded_by(f"from entrenar.cli.main import main\nmain({words!r})")


@pytest.mark.parametrize("package", ["trace", "quality"])
def test_the_tools_for_any_program_do_not_load_torch(package):
    """`trace` and `quality` work where torch is not installed."""
    names = [
        module.name for module in MODULES if module.package == package and module.name != "quality.mutation.worker"
    ]
    loaded = _loaded_by("\n".join(f"import entrenar.{name}" for name in names))
    assert "torch" not in loaded
    assert not loaded & {f"entrenar.{half}" for half in ("ops", "model", "data", "train", "recipe")}


def test_only_the_command_line_prints():
    """`print` is called in cli alone."""
    for module in MODULES:
        if module.package in ("cli", "__main__"):
            continue
        calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
        names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
        assert "print" not in names, module.path

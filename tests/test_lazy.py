"""Packages load a public name when it is first used: what is given is what an eager import would give."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar import lazy

SRC = Path(lazy.__file__).parent
LAZY = sorted(path.parent.relative_to(SRC).as_posix() for path in SRC.rglob("__init__.pyi"))


@pytest.mark.parametrize("package", LAZY)
def test_every_name_of_the_stub_is_the_object_of_its_module(package):
    """The names, `__all__` and `dir` are the stub's, and each is what its module defines."""
    stub = ast.parse((SRC / package / "__init__.pyi").read_text(encoding="utf-8"))
    homes = {a.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    written = next(ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    module = importlib.import_module(f"entrenar.{package}")
    assert sorted(written) == sorted(homes) == module.__all__
    assert set(homes) <= set(dir(module))
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a function of the name of its module."""
    folder = tmp_path / "lazy_sample"
    folder.mkdir()
    (folder / "__init__.py").write_text("from entrenar import lazy\n\nlazy.attach(__name__)\n")
    (folder / "__init__.pyi").write_text(
        "from lazy_sample.draw import draw\nfrom lazy_sample.other import PI\n__all__ = ['PI', 'draw']\n"
    )
    (folder / "draw.py").write_text("def draw():\n    return 'drawn'\n")
    (folder / "other.py").write_text("PI = 3\nHIDDEN = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("lazy_sample")
    for name in [name for name in sys.modules if name.startswith("lazy_sample")]:
        del sys.modules[name]


def test_nothing_is_loaded_before_it_is_used(package):
    """Importing the package loads no module of it; using a name loads its module alone."""
    assert "lazy_sample.other" not in sys.modules
    assert package.PI == 3
    assert "lazy_sample.draw" not in sys.modules


@pytest.mark.parametrize("first", ["module", "name"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(package, first):
    """Whether the module is imported first or the name used first, the name is the function."""
    if first == "module":
        importlib.import_module("lazy_sample.draw")
    assert package.draw() == "drawn"
    importlib.import_module("lazy_sample.draw")
    assert package.draw() == "drawn"


def test_other_names_are_refused_and_may_be_set(package):
    """A name that is not public is an AttributeError; an attribute can be set and found, a submodule too."""
    with pytest.raises(AttributeError, match="module 'lazy_sample' has no attribute 'HIDDEN'"):
        package.HIDDEN  # noqa: B018
    package.PI = 4
    assert package.PI == 4
    importlib.import_module("lazy_sample.other")
    assert package.other.HIDDEN == 4


def test_the_settings_load_without_torch():
    """A run's config is read and checked without torch."""
    code = "import sys, entrenar.config_file\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"

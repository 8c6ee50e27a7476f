"""Imports: resolved to files of the tree, to packages of others, to circles."""

import ast
import textwrap

import pytest

from entrenar.quality.debt.imports import couplings, imports_of


def coupled(files, above=()):
    return couplings({path: imports_of(ast.parse(textwrap.dedent(text))) for path, text in files.items()}, above)


TREE = {"src/pkg/__init__.py": "", "src/pkg/a.py": "", "src/pkg/sub/__init__.py": "", "src/pkg/sub/b.py": ""}


@pytest.mark.parametrize(
    ("statement", "files"),
    [
        ("import pkg.sub.b", ["src/pkg/sub/b.py"]),
        ("from pkg.sub import b", ["src/pkg/sub/b.py"]),
        ("from pkg.sub import name", ["src/pkg/sub/__init__.py"]),
        ("from pkg import a, sub", ["src/pkg/sub/__init__.py"]),
        ("from . import sub", ["src/pkg/sub/__init__.py"]),
        ("from .sub.b import name", ["src/pkg/sub/b.py"]),
        ("from .sub import b, name", ["src/pkg/sub/__init__.py", "src/pkg/sub/b.py"]),
        ("def f():\n  if x:\n    import pkg.sub", ["src/pkg/sub/__init__.py"]),
        ("import os, json.decoder", []),
    ],
)
def test_an_import_names_a_file_of_the_tree(statement, files):
    """Absolute or relative, a module or a name in one, at the top or inside."""
    found = coupled({**TREE, "src/pkg/a.py": statement})["src/pkg/a.py"]
    assert list(found.files) == files
    assert found.packages == ()


def test_relative_imports_climb():
    """Two dots are the package above."""
    found = coupled({**TREE, "src/pkg/sub/b.py": "from .. import a\nfrom ..a import x\n"})
    assert found["src/pkg/sub/b.py"].files == ("src/pkg/a.py",)


def test_third_parties_are_counted_once_and_the_standard_library_never():
    """By package, however many of its modules are imported."""
    found = coupled({"a.py": "import torch.nn, torch\nfrom torch.optim import Adam\nimport numpy, os.path, sys\n"})
    assert found["a.py"].packages == ("numpy", "torch")


def test_absolute_imports_are_understood_inside_a_part_of_a_package():
    """The folders above are packages too; a file that is not in the tree is the own package, not a third party."""
    found = coupled({"pkg/sub/b.py": "import pkg.sub.c\nimport pkg.elsewhere", "pkg/sub/c.py": ""}, ["pkg", "pkg/sub"])
    assert found["pkg/sub/b.py"].files == ("pkg/sub/c.py",)
    assert found["pkg/sub/b.py"].packages == ()


def test_a_circle_is_found_and_what_leads_to_it_is_not_in_it():
    """A -> b -> c -> a; d only uses them, e is only used."""
    found = coupled({"a.py": "import b", "b.py": "import c", "c.py": "import a, e", "d.py": "import a", "e.py": ""})
    for path in ("a.py", "b.py", "c.py"):
        assert found[path].circle == ("a.py", "b.py", "c.py")
    assert found["d.py"].circle == ("d.py",)
    assert found["e.py"].circle == ("e.py",)


def test_two_circles_stay_two():
    """Joined by one arrow."""
    found = coupled({"a.py": "import b", "b.py": "import a, c", "c.py": "import d", "d.py": "import c"})
    assert found["a.py"].circle == ("a.py", "b.py")
    assert found["c.py"].circle == ("c.py", "d.py")


def test_imports_for_types_alone_close_no_circle():
    """`if TYPE_CHECKING` is never executed; its else is."""
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import b\n"
    found = coupled({"a.py": types, "b.py": "import a"})
    assert found["a.py"].files == ("b.py",)
    assert len(found["a.py"].circle) == 1
    assert len(coupled({"a.py": f"{types}else:\n  import b\n", "b.py": "import a"})["a.py"].circle) == 2


def test_a_long_chain_does_not_exhaust_the_stack():
    """Ten thousand files, each importing the next."""
    chain = {f"m{n}.py": f"import m{(n + 1) % 10_000}" for n in range(10_000)}
    assert len(coupled(chain)["m0.py"].circle) == 10_000

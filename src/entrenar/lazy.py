"""A package whose public names are loaded when they are first used, so that `--help` need not wait for torch.

The names stand once, in the stub `__init__.pyi` beside the package's `__init__.py`: type checkers read it, and so does
`attach` (the way of Scientific Python's SPEC 1).
"""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package that imports the module of a public name on first use (PEP 562), and keeps the name."""

    def __getattr__(self, name: str) -> Any:
        """Load a public name.

        Raises: AttributeError for any other.
        """
        home = self.__dict__["_homes"].get(name)
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; where the import system sets a submodule that has a public name, the name is meant."""
        if isinstance(value, ModuleType) and self.__dict__["_homes"].get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Return the public names and what is loaded."""
        return sorted({*self.__dict__["_homes"], *self.__dict__})


def attach(package: str) -> None:
    """Give a package the names that its stub imports."""
    module = sys.modules[package]
    stub = Path(str(module.__file__)).with_name("__init__.pyi")
    imports = [node for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}
    module.__dict__.update(_homes=homes, __all__=sorted(homes))
    module.__class__ = LazyPackage

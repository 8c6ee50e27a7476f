"""Who imports whom: the imports of each file, resolved within the tree, and the circles among them."""

import ast
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Import:
    """One `import module` or `from module import names`; `level` counts the leading dots."""

    line: int
    module: str
    names: tuple[str, ...]
    level: int
    is_for_types: bool  # under `if TYPE_CHECKING`: never executed


@dataclass(frozen=True)
class Coupling:
    """The dependencies of one file: files of the tree, third-party packages, and its circle, itself included."""

    files: tuple[str, ...]
    packages: tuple[str, ...]
    circle: tuple[str, ...]


def imports_of(tree: ast.Module) -> list[Import]:
    """Return all imports of a file, wherever they stand."""
    return list(_imports(tree, is_for_types=False))


def _imports(node: ast.AST, *, is_for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, (), 0, is_for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            yield Import(child.lineno, child.module or "", names, child.level, is_for_types)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.body, []), is_for_types=True)
            yield from _imports(ast.Module(child.orelse, []), is_for_types=is_for_types)
        elif not isinstance(child, ast.expr):
            yield from _imports(child, is_for_types=is_for_types)


def couplings(files: Mapping[str, Sequence[Import]], packages_above: Iterable[str] = ()) -> dict[str, Coupling]:
    """Return what each file of a tree, named by its path, depends on.

    `packages_above` are the folders around the tree that are packages too, so that absolute imports are understood.
    """
    modules, own_roots = _modules(files, packages_above)
    uses: dict[str, set[str]] = {path: set() for path in files}
    runs: dict[str, set[str]] = {path: set() for path in files}
    packages: dict[str, set[str]] = {path: set() for path in files}
    for path, rows in files.items():
        for row in rows:
            targets = _targets(row, path, files, modules) - {path}
            uses[path] |= targets
            runs[path] |= set() if row.is_for_types else targets
            root = row.module.partition(".")[0]
            if not targets and row.level == 0 and root not in own_roots and root not in sys.stdlib_module_names:
                packages[path].add(root)
    circles = _circles(runs)
    return {
        path: Coupling(tuple(sorted(uses[path])), tuple(sorted(packages[path])), circles[path])
        for path in sorted(files)
    }


def _modules(files: Collection[str], packages_above: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return the file of each dotted name, and the names' first words."""
    packages = {_folder(path) for path in files if path.endswith("__init__.py")} | set(packages_above)
    modules, roots = {}, set()
    for path in files:
        folder = _folder(path)
        while folder and folder in packages:
            folder = _folder(folder)
        dotted = (
            path[len(folder) :].strip("/").removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")
        )
        modules[dotted] = path
        roots.add(dotted.partition(".")[0])
    return modules, roots


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _targets(row: Import, path: str, files: Collection[str], modules: Mapping[str, str]) -> set[str]:
    """Return the files that an import means: of `from package import name`, the file of that name if there is one."""
    if row.level:
        above = path.split("/")[: -row.level]
        place = "/".join([*above, *filter(None, row.module.split("."))])
        found = [_file_at(f"{place}/{name}", files) for name in row.names]
        package = _file_at(place, files)
    else:
        found = [modules.get(f"{row.module}.{name}") for name in row.names]
        package = modules.get(row.module)
    meant = {target or package for target in found} or {package}
    return {target for target in meant if target is not None}


def _file_at(place: str, files: Collection[str]) -> str | None:
    return next((path for path in (f"{place}.py", f"{place}/__init__.py".lstrip("/")) if path in files), None)


def _circles(graph: Mapping[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """Return for each node the nodes that it reaches and that reach it (Kosaraju's two searches), itself included."""
    order: list[str] = []
    seen: set[str] = set()
    for node in sorted(graph):
        order += _search(node, graph, seen)
    backwards: dict[str, set[str]] = {node: set() for node in graph}
    for node, targets in graph.items():
        for target in targets:
            backwards[target].add(node)
    seen = set()
    circles: dict[str, tuple[str, ...]] = {}
    for node in reversed(order):
        members = tuple(sorted(_search(node, backwards, seen)))
        circles |= dict.fromkeys(members, members)
    return circles


def _search(root: str, graph: Mapping[str, set[str]], seen: set[str]) -> list[str]:
    """Return the unseen nodes that can be reached, each after those that it reaches."""
    if root in seen:
        return []
    seen.add(root)
    order: list[str] = []
    path = [(root, iter(sorted(graph[root])))]
    while path:
        node, targets = path[-1]
        target = next((target for target in targets if target not in seen), None)
        if target is None:
            order.append(node)
            path.pop()
        else:
            seen.add(target)
            path.append((target, iter(sorted(graph[target]))))
    return order

"""Score a folder, a file, or a revision: find the files, measure those that are not known yet, put them together."""

import os
from collections.abc import Iterable
from pathlib import Path

from entrenar.errors import DataError
from entrenar.quality.debt import measure
from entrenar.quality.debt.cache import Cache
from entrenar.quality.debt.score import TreeScore, score_tree
from entrenar.quality.debt.sources import Entry, Tree, from_folder, is_excluded
from entrenar.quality.git import Repository, find

_MAX_PROCESSES = 8


def root_of(path: Path, project: Path) -> Path:
    """Return the folder from which files are named: the project's if `path` lies in it.

    Otherwise the repository's, and without one the folder around the packages that `path` lies in.
    """
    if path.resolve().is_relative_to(project.resolve()):
        return project.resolve()
    repository = find(path)
    if repository is not None:
        return repository.root
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def score_path(path: Path, project: Path, exclude: Iterable[str] = ()) -> TreeScore:
    """Score the Python files at or under `path` as they are on the disk.

    Raises: DataError for a path without Python files; MachineError if a tool is missing.
    """
    repository = find(path)
    tree = from_folder(path, root_of(path, project), exclude)
    if not tree.entries:
        raise DataError(f"{path} holds no Python file to score; name a folder that does, or exclude less")
    return score(tree, None if repository is None else repository.objects)


def tree_of_revision(
    repository: Repository, commit: str, path: Path, project: Path, exclude: Iterable[str] = ()
) -> Tree:
    """Return the Python files at or under `path` as they are in a commit. Nothing is checked out.

    `path` need not exist any more; files are named from the project, which is the repository or a folder in it.
    """
    patterns, root = tuple(exclude), repository.root.resolve()
    inside = project.resolve().is_relative_to(root)
    prefix = project.resolve().relative_to(root).as_posix() + "/" if inside and project.resolve() != root else ""
    place = ((project if inside else root) / path).resolve().relative_to(root).as_posix()
    entries = []
    for blob in repository.blobs(commit, [] if place == "." else [place]):
        name = blob.path.removeprefix(prefix)
        if name.endswith(".py") and not _is_hidden(name) and not is_excluded(name, patterns):
            entries.append(Entry(name, blob.hash))
    packages = tuple(folder.removeprefix(prefix) for folder in _packages_above(repository, commit, place))
    return Tree(tuple(entries), packages, repository.read)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _packages_above(repository: Repository, commit: str, path: str) -> Iterable[str]:
    folders = [str(folder) for folder in Path(path, "x").parents if folder != Path()]
    inits = {blob.path for blob in repository.blobs(commit, [f"{folder}/__init__.py" for folder in folders])}
    return [folder for folder in folders if f"{folder}/__init__.py" in inits]


def score(tree: Tree, folder: Path | None, memory: dict[tuple[str, str], measure.Found] | None = None) -> TreeScore:
    """Score a tree.

    Measurements are cached in `folder` and in `memory`; a caller that scores many trees passes `memory` along.
    """
    known = {} if memory is None else memory
    wanted = {(entry.blob, entry.name): entry for entry in tree.entries if (entry.blob, entry.name) not in known}
    if wanted:
        cache = Cache(folder, measure.scorer())
        try:
            known |= {(entry.blob, entry.name): found for entry, found in cache.load(wanted.values()).items()}
            missing = {key: entry for key, entry in wanted.items() if key not in known}
            found = _measured(missing, tree)
            cache.store({missing[key]: measured for key, measured in found.items()})
        finally:
            cache.close()
        known |= found
    return score_tree({entry.path: known[entry.blob, entry.name] for entry in tree.entries}, tree.packages_above)


def _measured(missing: dict[tuple[str, str], Entry], tree: Tree) -> dict[tuple[str, str], measure.Found]:
    if not missing:
        return {}
    contents = tree.read([entry.blob for entry in missing.values()])
    keys = {"/".join(key): key for key in missing}
    found = measure.measure(
        {name: contents[blob] for name, (blob, _) in keys.items()},
        {name: file for name, (_, file) in keys.items()},
        min(_MAX_PROCESSES, os.cpu_count() or 1),
    )
    return {keys[name]: measured for name, measured in found.items()}

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


def root_of(path: Path) -> Path:
    """Return the folder from which the files of `path` are named: the repository's, or `path` itself outside of one."""
    repository = find(path)
    if repository is not None:
        return repository.root
    return path.resolve() if path.is_dir() else path.resolve().parent


def score_path(path: Path, exclude: Iterable[str] = ()) -> TreeScore:
    """Score the Python files at or under `path` as they are on the disk.

    Raises: DataError for a path without Python files; MachineError if a tool is missing.
    """
    repository = find(path)
    tree = from_folder(path, root_of(path), exclude)
    if not tree.entries:
        raise DataError(f"{path} holds no Python file to score; name a folder that does, or exclude less")
    return _score(tree, None if repository is None else repository.objects)


def score_revision(repository: Repository, commit: str, path: str = "", exclude: Iterable[str] = ()) -> TreeScore:
    """Score the Python files at or under `path`, from the root, as they are in a commit. Nothing is checked out."""
    patterns = tuple(exclude)
    blobs = repository.blobs(commit, [path] if path else [])
    packages = tuple(_packages_above(repository, commit, path))
    entries = tuple(
        Entry(blob.path, blob.hash)
        for blob in blobs
        if blob.path.endswith(".py") and not _is_hidden(blob.path) and not is_excluded(blob.path, patterns)
    )
    return _score(Tree(entries, packages, repository.read), repository.objects)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _packages_above(repository: Repository, commit: str, path: str) -> Iterable[str]:
    folders = [str(folder) for folder in Path(path, "x").parents if folder != Path()]
    inits = {blob.path for blob in repository.blobs(commit, [f"{folder}/__init__.py" for folder in folders])}
    for folder in folders:
        if f"{folder}/__init__.py" in inits:
            yield folder


def _score(tree: Tree, folder: Path | None) -> TreeScore:
    cache = Cache(folder, measure.scorer())
    try:
        known = cache.load(tree.entries)
        missing = {entry.blob + entry.name: entry for entry in tree.entries if entry not in known}
        if missing:
            contents = tree.read([entry.blob for entry in missing.values()])
            found = measure.measure(
                {key: contents[entry.blob] for key, entry in missing.items()},
                {key: entry.name for key, entry in missing.items()},
                min(_MAX_PROCESSES, os.cpu_count() or 1),
            )
            cache.store({missing[key]: measured for key, measured in found.items()})
        else:
            found = {}
    finally:
        cache.close()
    files = {entry.path: known.get(entry) or found[entry.blob + entry.name] for entry in tree.entries}
    return score_tree(files, tree.packages_above)

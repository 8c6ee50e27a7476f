"""Score commits from git's objects: each file's content is measured once, whatever number of commits hold it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.quality.debt import formula
from entrenar.quality.debt.measure import Found
from entrenar.quality.debt.score import TreeScore
from entrenar.quality.debt.scoring import score, tree_of_revision
from entrenar.quality.debt.sources import Entry
from entrenar.quality.git import Commit, Repository

SCHEMA = 1
NOT_MEASURED = "not measured"  # a text, so that a filter that looks for a grade in it finds none


@dataclass(frozen=True)
class Point:
    """A commit and the score of its tree; `name` is the user's name for it, unless a range selected it."""

    commit: Commit
    tree: TreeScore
    name: str | None = None

    @property
    def grade(self) -> str:
        """The grade, or that there is none: the path did not exist, or had no code."""
        return NOT_MEASURED if self.tree.score is None else formula.grade(self.tree.score)


def points(
    repository: Repository,
    commits: Sequence[tuple[Commit, str | None]],
    path: Path,
    project: Path,
    exclude: Iterable[str] = (),
) -> Iterator[Point]:
    """Yield each commit with the score of `path` at it; commits with the same files are scored once."""
    patterns = tuple(exclude)
    known: dict[tuple[Entry, ...], TreeScore] = {}
    memory: dict[tuple[str, str], Found] = {}
    for commit, name in commits:
        tree = tree_of_revision(repository, commit.hash, path, project, patterns)
        if tree.entries not in known:
            known[tree.entries] = score(tree, repository.objects, memory)
        yield Point(commit, known[tree.entries], name)


def as_json(found: Sequence[Point], scorer: dict[str, str], path: str) -> dict[str, Any]:
    """Return the history, oldest first; `change` is against the point before."""
    rows = []
    before: float | None = None
    for point in found:
        now = point.tree.score
        rows.append({
            "commit": point.commit.hash,
            "name": point.name,
            "date": point.commit.date,
            "subject": point.commit.subject,
            "score": {"total": None if now is None else round(now, 4), "grade": point.grade},
            "change": None if now is None or before is None else round(now - before, 4),
            "files": len(point.tree.files),
            "not_measured": sorted(point.tree.unmeasured),
        })  # fmt: skip
        before = before if now is None else now
    return {"schema": SCHEMA, "scorer": scorer, "path": path, "history": rows}


def as_text(found: Sequence[Point]) -> Iterator[str]:
    """Yield a line a commit."""
    before: float | None = None
    for point in found:
        now = point.tree.score
        value = "     -" if now is None else f"{now:6.2f}"
        change = "       " if now is None or before is None else f"{now - before:+7.2f}"
        gaps = f"  ({len(point.tree.unmeasured)} files without a score)" if point.tree.unmeasured else ""
        name = f"{point.name}: " if point.name else ""
        commit, subject = point.commit, _printable(point.commit.subject)
        yield f"{commit.hash[:10]} {commit.date[:10]} {value} {change} {point.grade:<2}  {name}{subject}{gaps}"
        before = before if now is None else now


def _printable(text: str) -> str:
    """Return text without control characters: a commit's subject is a stranger's."""
    return "".join(character if character.isprintable() else "?" for character in text)

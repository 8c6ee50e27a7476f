"""Collect facts about a repository, in lines that fit into a prompt.

A missing measurement is named with the command that measures it.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entrenar.errors import EntrenarError, FormatError
from entrenar.files import read_json
from entrenar.quality.debt import formula, rules
from entrenar.quality.debt.scoring import score_path
from entrenar.quality.mutation.verdicts import read_verdicts
from entrenar.quality.risk import read_coverage

COVERAGE_FILE = Path("coverage.json")
MUTATION_FILE = Path("quality/results/mutation.json")
_ROWS = 8


class Facts:
    """Facts of one project, found when a prompt asks for them; `path` is a file or a folder, or the whole."""

    def __init__(self, project: Path) -> None:
        self._project = project

    def score(self, path: str = ".") -> str:
        """Return score and grade of a path."""
        return _told(lambda: self._score(path), f"entrenar quality tdg {path}")

    def hot_spots(self, path: str = ".") -> str:
        """Return the functions with the lowest scores, and what costs most in each."""
        return _told(lambda: "\n".join(self._hot_spots(path)), f"entrenar quality tdg {path} --functions")

    def uncovered(self, path: str = ".") -> str:
        """Return the lines and branches that the tests did not reach."""
        return _told(lambda: "\n".join(self._uncovered(path)), "make coverage")

    def survivors(self, path: str = ".") -> str:
        """Return the mutants that the tests did not notice."""
        return _told(lambda: "\n".join(self._survivors(path)), f"entrenar quality mutate --target {path}")

    def _score(self, path: str) -> str:
        tree = score_path(self._project / path, self._project, rules.load(self._project).exclude)
        return "not measured: no code" if tree.score is None else f"{tree.score:.1f} {formula.grade(tree.score)}"

    def _hot_spots(self, path: str) -> Iterator[str]:
        tree = score_path(self._project / path, self._project, rules.load(self._project).exclude)
        every = ((one.score, file.path, one.line, one.name, file) for file in tree.files for one in file.functions)
        rows = sorted(row for row in every if row[0] < 100)
        for score, place, line, name, file in rows[:_ROWS]:
            said = [finding.text.partition(": ")[2] for finding in file.findings if finding.text.startswith(f"{name}:")]
            yield f"{place}:{line} {name}: {score:.1f}" + (f" ({', '.join(said)})" if said else "")
        if not rows:
            yield f"none: no function of {path} owes anything"

    def _uncovered(self, path: str) -> Iterator[str]:
        place = self._project / COVERAGE_FILE
        read_coverage(place)  # refuses what is no coverage, or has no branches
        files: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))["files"]
        mine = {name: row for name, row in files.items() if _is_at(name, path)}
        ranked = sorted(mine.items(), key=lambda item: (-len(item[1].get("missing_lines", ())), item[0]))
        missing = [(name, row["missing_lines"]) for name, row in ranked if row.get("missing_lines")]
        yield from (f"{name}: lines {', '.join(map(str, lines))}" for name, lines in missing[:_ROWS])
        if not missing:
            yield f"every line of {path} was reached" if mine else f"not measured: {path} is not in {COVERAGE_FILE}"

    def _survivors(self, path: str) -> Iterator[str]:
        place = self._project / MUTATION_FILE
        if not place.is_file():
            raise FormatError(f"{MUTATION_FILE} is missing")
        read_json(place)
        tried = [verdict for verdict in read_verdicts(place) if _is_at(verdict.file, path)]
        alive = [verdict for verdict in tried if verdict.status == "survived"]
        for verdict in alive[:_ROWS]:
            yield f"{verdict.file}:{verdict.line} {verdict.function}: {verdict.original!r} became {verdict.mutated!r}"
        if not alive:
            yield f"none of {len(tried)} mutants" if tried else f"not measured: no mutant of {path} was tried"


def _is_at(name: str, path: str) -> bool:
    return path in (".", name) or name.startswith(path.rstrip("/") + "/")


def _told(find: Callable[[], str], command: str) -> str:
    try:
        return find()
    except EntrenarError as fault:
        return f"not measured ({str(fault).partition(chr(10))[0]}); run `{command}`"

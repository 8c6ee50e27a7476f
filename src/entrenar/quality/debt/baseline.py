"""A baseline: the scores that a tree had, kept in a file, and whether it has dropped since.

A drop of exactly the limit passes; anything more does not. Scores by different scorers are not comparable, and are
refused. The tree is compared over the files that exist in both, so that a new clean file cannot pay for a worse one;
a new file is held against the tree's own baseline instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, FormatError
from entrenar.files import atomic_write, read_json
from entrenar.quality.debt import formula
from entrenar.quality.debt.report import dumps
from entrenar.quality.debt.score import TreeScore

SCHEMA = 1
MAX_DROP = 5.0
DIGITS = 4  # scores are kept and compared with so many decimals: a limit of 5.0 must not fail by 1e-14


@dataclass(frozen=True)
class Baseline:
    """Scores by file, the tree's, and the versions that made them."""

    scorer: Mapping[str, str]
    path: str
    score: float
    files: Mapping[str, float]


@dataclass(frozen=True)
class Drop:
    """A score that fell: of the tree, of a file, or of a new file against the tree."""

    what: str
    before: float
    now: float

    @property
    def points(self) -> float:
        """The size of the fall."""
        return round(self.before - self.now, DIGITS)


@dataclass(frozen=True)
class Comparison:
    """A tree against its baseline: the tree's own change, files that fell, files that came and went."""

    tree: Drop
    fell: tuple[Drop, ...]
    added: tuple[Drop, ...]
    removed: tuple[str, ...]

    def violations(self, max_drop: float) -> list[Drop]:
        """Return what fell by more than the limit, worst first."""
        every = [drop for drop in (self.tree, *self.fell, *self.added) if drop.points > max_drop]
        return sorted(every, key=lambda drop: (-drop.points, drop.what))


def from_tree(tree: TreeScore, scorer: Mapping[str, str], path: str) -> Baseline:
    """Return the baseline of a scored tree.

    Raises: FormatError if files could not be measured, or none has code: a baseline has no gaps.
    """
    if tree.unmeasured:
        place, gap = next(iter(tree.unmeasured.items()))
        raise FormatError(f"a baseline must have no gaps; {place}:{gap.line} cannot be measured: {gap.reason}")
    if tree.score is None:
        raise FormatError("a baseline needs a file with code; there is none to score")
    files = {file.path: round(file.score, DIGITS) for file in tree.files}
    return Baseline(dict(scorer), path, round(tree.score, DIGITS), files)


def write(baseline: Baseline, place: Path) -> None:
    """Write a baseline: the same bytes for the same scores."""
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(place, dumps({
        "schema": SCHEMA, "scorer": dict(baseline.scorer), "path": baseline.path, "score": baseline.score,
        "files": dict(sorted(baseline.files.items())),
    }) + "\n")  # fmt: skip


def read(place: Path) -> Baseline:
    """Read a baseline.

    Raises: ConfigError for a missing file; FormatError for a damaged one or another schema's.
    """
    remedy = f"`entrenar quality baseline create --output {place}` makes one"
    try:
        table: Any = read_json(place)
        if table["schema"] != SCHEMA:
            raise FormatError(f"{place} must have schema {SCHEMA}, has {table['schema']!r}; {remedy}")
        files = {str(name): float(score) for name, score in table["files"].items()}
        baseline = Baseline(dict(table["scorer"]), str(table["path"]), float(table["score"]), files)
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing: there is no baseline to compare with; {remedy}") from missing
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise FormatError(f"{place} is no baseline: {fault!r}; {remedy}") from fault
    if not all(0 <= score <= 100 for score in (baseline.score, *files.values())):
        raise FormatError(f"{place} is no baseline: a score is not within 0 and 100; {remedy}")
    return baseline


def compare(baseline: Baseline, now: Baseline) -> Comparison:
    """Compare two sets of scores.

    Raises: FormatError if they were made by different scorers, or have no file in common.
    """
    differing = [
        f"{name} {baseline.scorer.get(name)} then, {now.scorer.get(name)} now"
        for name in sorted({*baseline.scorer, *now.scorer})
        if baseline.scorer.get(name) != now.scorer.get(name)
    ]
    if differing:
        raise FormatError(f"scores by different scorers cannot be compared ({'; '.join(differing)}); create it again")
    common = sorted(set(baseline.files) & set(now.files))
    if not common:
        raise FormatError("the baseline and the tree have no file in common; was it made of another path?")
    before, after = (round(formula.mean(side.files[name] for name in common), DIGITS) for side in (baseline, now))
    fell = [Drop(name, baseline.files[name], now.files[name]) for name in common]
    added = [Drop(name, baseline.score, now.files[name]) for name in sorted(set(now.files) - set(baseline.files))]
    return Comparison(
        Drop("all files", before, after),
        tuple(drop for drop in fell if drop.points > 0),
        tuple(added),
        tuple(sorted(set(baseline.files) - set(now.files))),
    )

"""Read a tree's required scores: `[tool.entrenar.quality]` in pyproject.toml, and `.pmat/tdg-rules.toml`.

    min_grade = "A-"                 # of every file
    min_mean_score = 95.0            # of the tree
    max_score_drop = 5.0             # against the baseline
    baseline = ".pmat/tdg-baseline.json"
    exclude = ["tests/data/*"]
    include = ["more-rules.toml"]    # other files of rules, from this file's folder
    llama_min_grade = "A"            # of the files that [paths] names llama

    [paths]
    llama = ["src/entrenar/ops/*"]

Both files hold at once: where they say the same thing differently, the stricter demand stands.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError
from entrenar.quality.debt import formula
from entrenar.quality.debt.baseline import MAX_DROP
from entrenar.quality.debt.sources import is_excluded

RULES_FILE = Path(".pmat/tdg-rules.toml")
BASELINE_FILE = Path(".pmat/tdg-baseline.json")
_GRADE = "_min_grade"
_TYPES: dict[str, tuple[type, ...]] = {
    "min_grade": (str,), "min_mean_score": (int, float), "max_score_drop": (int, float), "baseline": (str,),
    "exclude": (list,), "include": (list,), "paths": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The demands of a tree; `named` are patterns of paths with a grade of their own."""

    min_grade: str | None = None
    min_mean_score: float | None = None
    max_score_drop: float | None = None
    baseline: str | None = None
    exclude: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def grade_of(self, path: str) -> str | None:
        """Return the grade that is demanded of a file: the strictest that names it."""
        wanted = [grade for name, grade in self.named.items() if is_excluded(path, self.paths[name])]
        wanted += [self.min_grade] if self.min_grade else []
        return max(wanted, key=formula.least_score) if wanted else None

    @property
    def drop(self) -> float:
        """The limits on how far a score may fall below its baseline."""
        return MAX_DROP if self.max_score_drop is None else self.max_score_drop


def load(root: Path) -> Rules:
    """Read the rules of the tree at `root`; without either file nothing is demanded.

    Raises: ConfigError for bad TOML, an unknown key, a value of the wrong kind, an include that is missing or circular.
    """
    rules = Rules()
    project = root / "pyproject.toml"
    if project.is_file():
        tool = _parsed(project).get("tool", {})
        rules = _joined(rules, tool.get("entrenar", {}).get("quality", {}), project, (project,))
    if (root / RULES_FILE).is_file():
        rules = _included(rules, root / RULES_FILE, ())
    unnamed = sorted(set(rules.named) - set(rules.paths))
    if unnamed:
        raise ConfigError(f"{unnamed[0]}{_GRADE} needs the files that it is for: give [paths] {unnamed[0]} = [...]")
    return rules


def _included(rules: Rules, place: Path, above: tuple[Path, ...]) -> Rules:
    resolved = place.resolve()
    if resolved in above:
        chain = " -> ".join(path.name for path in (*above[above.index(resolved) :], resolved))
        raise ConfigError(f"{place}: rules must not include themselves: {chain}")
    return _joined(rules, _parsed(place), place, (*above, resolved))


def _parsed(place: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing, and rules include it") from missing
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{place} must be TOML: {fault}") from fault


def _joined(rules: Rules, table: Mapping[str, Any], place: Path, above: tuple[Path, ...]) -> Rules:
    """Return the stricter of `rules` and of what a table says, includes first."""
    for key, value in table.items():
        _check(key, value, place)
    for name in table.get("include", ()):
        rules = _included(rules, place.parent / name, above)
    grades = {key.removesuffix(_GRADE): value for key, value in table.items() if key.endswith(_GRADE)}
    named = {
        name: _stricter(rules.named.get(name), grades.get(name)) or "F" for name in {*rules.named, *grades}
    }  # fmt: skip
    paths = {name: tuple(patterns) for name, patterns in table.get("paths", {}).items()}
    return Rules(
        _stricter(rules.min_grade, table.get("min_grade")),
        max(filter(None, (rules.min_mean_score, table.get("min_mean_score"))), default=None),
        min((drop for drop in (rules.max_score_drop, table.get("max_score_drop")) if drop is not None), default=None),
        table.get("baseline", rules.baseline),
        (*rules.exclude, *table.get("exclude", ())),
        named,
        {**rules.paths, **{name: (*rules.paths.get(name, ()), *patterns) for name, patterns in paths.items()}},
    )


def _stricter(one: str | None, other: str | None) -> str | None:
    grades = [grade for grade in (one, other) if grade is not None]
    return max(grades, key=formula.least_score) if grades else None


def _check(key: str, value: Any, place: Path) -> None:
    is_grade = key.endswith(_GRADE) and key != "min_grade"
    kinds = (str,) if is_grade else _TYPES.get(key)
    if kinds is None:
        near = difflib.get_close_matches(key, _TYPES, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_TYPES)} and NAME{_GRADE}"
        raise ConfigError(f"{place}: unknown rule {key!r}{hint}")
    lists = value.values() if isinstance(value, dict) else [value] if isinstance(value, list) else []
    is_text = all(isinstance(rows, list) and all(isinstance(row, str) for row in rows) for rows in lists)
    if not isinstance(value, kinds) or isinstance(value, bool) or not is_text:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{place}: {key} must be {words}{' of text' if lists else ''}, got {value!r}")
    if key == "min_grade" or is_grade:
        try:
            formula.least_score(str(value))
        except ConfigError as fault:
            raise ConfigError(f"{place}: {key}: {fault}") from fault
    elif isinstance(value, (int, float)) and not 0 <= value <= 100:
        raise ConfigError(f"{place}: {key} must be within 0 and 100, got {value}")

"""What each part of a project must prove: `quality/risk.toml` gives each component its floors, by the harm of an error.

[whole]
line = 97
branch = 93

[[component]]
name = "attention"
files = ["src/entrenar/ops/attention.py"]
tests = ["tests/ops"]      # what mutants of these files are run against
line = 100                 # least percentage of lines, branches and mutants; a floor left out is not asked for
branch = 95
mutation = 94
critical = true            # part of `make coverage-critical`
"""

import fnmatch
import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, FormatError, GateFailed

RISK_FILE = Path("quality/risk.toml")


@dataclass(frozen=True)
class Component:
    """Files of one risk, and their floors in percent."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...] = ("tests",)
    line: float | None = None
    branch: float | None = None
    mutation: float | None = None
    critical: bool = False


@dataclass(frozen=True)
class Risk:
    """The floors of the whole and of each component."""

    line: float
    branch: float
    components: tuple[Component, ...]


def load_risk(path: Path) -> Risk:
    """Read the table of risks.

    Raises: ConfigError for a missing file, bad TOML, an unknown key, or a component without files.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise ConfigError(
            f"{path} is missing: it gives each component its floors; run from the project's root"
        ) from missing
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError(f"{path} must be TOML: {fault}") from fault
    known = {field.name for field in fields(Component)}
    components = []
    for row in table.get("component", []):
        unknown = set(row) - known
        if unknown or not row.get("files") or "name" not in row:
            wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "name or files missing"
            raise ConfigError(
                f"{path}: a component needs name and files and may have {', '.join(sorted(known))}; {wrong}"
            )
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        components.append(Component(**values))
    whole = table.get("whole", {})
    if not components or set(whole) != {"line", "branch"}:
        raise ConfigError(f"{path} needs [whole] with line and branch, and at least one [[component]]")
    return Risk(whole["line"], whole["branch"], tuple(components))


@dataclass(frozen=True)
class Covered:
    """Lines and branches of one file or of several."""

    lines: int = 0
    covered_lines: int = 0
    branches: int = 0
    covered_branches: int = 0

    def __add__(self, other: "Covered") -> "Covered":
        return Covered(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def line(self) -> float:
        """Percentage of lines."""
        return 100 * self.covered_lines / self.lines if self.lines else 100.0

    @property
    def branch(self) -> float:
        """Percentage of branches."""
        return 100 * self.covered_branches / self.branches if self.branches else 100.0


def read_coverage(path: Path) -> dict[str, Covered]:
    """Read what `coverage json` wrote, by file.

    Raises: FormatError for a missing file, one of another kind, or one without branches.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not table["meta"]["branch_coverage"]:
            raise FormatError(f"{path} has no branches; measure with branch = true")
        return {name: _covered(entry["summary"]) for name, entry in table["files"].items()}
    except FileNotFoundError as missing:
        raise FormatError(f"{path} is missing: coverage was not measured; run `make coverage`") from missing
    except (ValueError, KeyError, TypeError) as fault:
        raise FormatError(f"{path} is not what `coverage json` writes: {fault!r}") from fault


def _covered(summary: dict[str, int]) -> Covered:
    return Covered(
        summary["num_statements"], summary["covered_lines"], summary["num_branches"], summary["covered_branches"]
    )


@dataclass(frozen=True)
class Floor:
    """One measured percentage beside its floor."""

    what: str
    kind: str
    measured: float
    floor: float

    @property
    def holds(self) -> bool:
        """True if the floor is reached; a percentage is not rounded up to it."""
        return self.measured >= self.floor


def coverage_floors(risk: Risk, coverage: dict[str, Covered], *, critical_only: bool = False) -> list[Floor]:
    """Compare each file of each component, and the whole, with its floors.

    Raises: GateFailed if a component's pattern meets no measured file: a gate must not pass by absence.
    """
    floors = []
    for component in risk.components:
        if critical_only and not component.critical:
            continue
        for pattern in component.files:
            names = fnmatch.filter(coverage, pattern)
            if not names and (component.line is not None or component.branch is not None):
                raise GateFailed(f"{component.name}: no coverage was measured of {pattern}; was the file moved?")
            for name in names:
                for kind in ("line", "branch"):
                    floor = getattr(component, kind)
                    if floor is not None:
                        floors.append(Floor(name, kind, getattr(coverage[name], kind), floor))
    if not critical_only:
        whole = sum(coverage.values(), Covered())
        floors += [
            Floor("all of it", "line", whole.line, risk.line),
            Floor("all of it", "branch", whole.branch, risk.branch),
        ]
    return floors


def demand(floors: list[Floor], remedy: str) -> None:
    """Raise GateFailed naming every floor that is missed."""
    missed = [f"{f.what}: {f.kind} {f.measured:.2f} %, at least {f.floor:g} % wanted" for f in floors if not f.holds]
    if missed:
        raise GateFailed("\n".join([*missed, remedy]))

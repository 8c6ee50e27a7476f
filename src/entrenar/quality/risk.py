"""Read what each part of a project must prove: `quality/risk.toml` gives each component a risk level and floors.

[whole]
line = 97
branch = 93

[[component]]
name = "attention"
level = "very high"        # the specification's four: very high, high, medium, low
files = ["src/entrenar/ops/attention.py"]
tests = ["tests/ops"]      # what mutants of these files are run against
gradcheck = ["attention"]  # operations whose certificate must show a gradient check; demanded at very high
line = 100                 # least percentage of lines, branches and mutants; a floor left out is its level's
branch = 95
mutation = 94
critical = true            # part of `make coverage-critical`

A floor may lie above its level's, never below.
"""

import fnmatch
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, FormatError, GateFailed, NotMeasured
from entrenar.files import read_json

RISK_FILE = Path("quality/risk.toml")
CERTIFICATES_FILE = Path("quality/certificates.json")


@dataclass(frozen=True)
class Level:
    """The minimum that a risk level requires; None means no requirement."""

    line: float
    mutation: float | None
    gradcheck: bool = False


# The specification's table (2.3).
LEVELS = {
    "very high": Level(line=100, mutation=90, gradcheck=True),
    "high": Level(line=95, mutation=85),
    "medium": Level(line=90, mutation=80),
    "low": Level(line=85, mutation=None),
}


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
    level: str | None = None
    gradcheck: tuple[str, ...] = ()


@dataclass(frozen=True)
class Risk:
    """The floors of the whole and of each component."""

    line: float
    branch: float
    components: tuple[Component, ...]


def load_risk(path: Path) -> Risk:
    """Read the table of risks.

    Raises: ConfigError for a missing file, bad TOML, an unknown key, a component without files, too low a floor.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise ConfigError(
            f"{path} is missing: it gives each component its floors; run from the project's root"
        ) from missing
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError(f"{path} must be TOML: {fault}") from fault
    components = tuple(_component(row, path) for row in table.get("component", []))
    whole = table.get("whole", {})
    if not components or set(whole) != {"line", "branch"}:
        raise ConfigError(f"{path} needs [whole] with line and branch, and at least one [[component]]")
    return Risk(whole["line"], whole["branch"], components)


def _component(row: Mapping[str, Any], path: Path) -> Component:
    known = {field.name for field in fields(Component)}
    unknown = set(row) - known
    if unknown or not row.get("files") or "name" not in row:
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else "name or files missing"
        raise ConfigError(f"{path}: a component needs name and files and may have {', '.join(sorted(known))}; {wrong}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    component = Component(**values)
    return component if component.level is None else _at_its_level(component, path)


def _at_its_level(component: Component, path: Path) -> Component:
    """Return the component with the floors of its level where it names none."""
    if component.level not in LEVELS:
        raise ConfigError(
            f"{path}: {component.name}: level must be one of {', '.join(LEVELS)}; got {component.level!r}"
        )
    level = LEVELS[component.level]
    for kind, least in (("line", level.line), ("mutation", level.mutation)):
        floor = getattr(component, kind)
        if None not in (floor, least) and floor < least:
            raise ConfigError(
                f"{path}: {component.name}: {kind} must be at least {least:g} at level {component.level}, got {floor:g}"
            )
    if level.gradcheck and not component.gradcheck:
        raise ConfigError(f"{path}: {component.name}: level {component.level} demands gradcheck = [its operations]")
    line = level.line if component.line is None else component.line
    return replace(component, line=line, mutation=component.mutation or level.mutation)


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
    """One measured figure and its floor."""

    what: str
    kind: str
    measured: float
    floor: float
    unit: str = "%"

    @property
    def holds(self) -> bool:
        """True if the floor is reached; a percentage is not rounded up to it."""
        return self.measured >= self.floor


def coverage_floors(risk: Risk, coverage: dict[str, Covered], *, critical_only: bool = False) -> list[Floor]:
    """Compare each file of each component, and the whole, with its floors.

    Raises: GateFailed if a component's pattern meets no measured file: a gate must not pass by absence.
    """
    chosen = [component for component in risk.components if component.critical or not critical_only]
    floors = [floor for component in chosen for floor in _component_floors(component, coverage)]
    if not critical_only:
        whole = sum(coverage.values(), Covered())
        floors += [
            Floor("all of it", "line", whole.line, risk.line),
            Floor("all of it", "branch", whole.branch, risk.branch),
        ]
    return floors


def _component_floors(component: Component, coverage: Mapping[str, Covered]) -> Iterator[Floor]:
    asked = [(kind, floor) for kind in ("line", "branch") if (floor := getattr(component, kind)) is not None]
    for pattern in component.files:
        names = fnmatch.filter(coverage, pattern)
        if asked and not names:
            raise GateFailed(f"{component.name}: no coverage was measured of {pattern}; was the file moved?")
        for name in names:
            yield from (Floor(name, kind, getattr(coverage[name], kind), floor) for kind, floor in asked)


def gradient_floors(risk: Risk, certificates: Path, *, critical_only: bool = False) -> list[Floor]:
    """Demand a gradient check in the certificate of each operation whose component asks for one.

    Raises: NotMeasured if there are no certificates; FormatError for a file that holds none.
    """
    asked = [
        operation for component in risk.components if component.critical or not critical_only
        for operation in component.gradcheck
    ]  # fmt: skip
    if not asked:
        return []
    try:
        shown = read_json(certificates)["operations"]
        cases = {
            name: sum(method["cases"] for method in shown.get(name, {}).get("gradcheck", {}).values()) for name in asked
        }
    except FileNotFoundError as missing:
        raise NotMeasured(
            f"{certificates} is missing: no gradient check was measured; run `make certificates`"
        ) from missing
    except (KeyError, TypeError, AttributeError) as fault:
        raise FormatError(f"{certificates} holds no certificates: {fault!r}; run `make certificates`") from fault
    return [Floor(name, "gradcheck", count, 1, "cases") for name, count in cases.items()]


def demand(floors: list[Floor], remedy: str) -> None:
    """Raise GateFailed naming every floor that is missed."""
    missed = [
        f"{floor.what}: {floor.kind} {floor.measured:.2f} {floor.unit}, at least {floor.floor:g} {floor.unit} wanted"
        for floor in floors
        if not floor.holds
    ]
    if missed:
        raise GateFailed("\n".join([*missed, remedy]))

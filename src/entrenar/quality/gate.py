r"""Run gates: the checks that a tree must pass at each tier, listed in `quality/gates.toml`.

    [[gate]]
    name = "debt"
    tiers = [2]                    # of `gate --tier N`; a tier runs its own gates and those of lower tiers
    phases = ["p1"]                # of `gate --phase P`
    run = "entrenar quality check-quality --path src --fail-on-violation"
    number = 'mean ([\d.]+)'        # the measured number: the first group, in the output
    least = 95                     # or `most`; without either the command's own verdict counts alone
    fix = "entrenar quality tdg src --explain"
    timeout_s = 600

    [[gate.plant]]                 # the self-test's violation, in a scratch copy
    file = "src/planted.py"
    text = "..."                   # written; or `old` and `new`, replaced wherever they stand
    expect = "planted.py"          # what the failing gate must say

A gate passes if its command does and its number holds. No number where one is asked for is not measured, never passed.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError
from entrenar.quality.commands import Outcome, Verdict, run

GATES_FILE = Path("quality/gates.toml")
PHASES = ("p1", "p2", "p3", "p4")
TIERS = (1, 2, 3)


@dataclass(frozen=True)
class Plant:
    """One edit of a scratch copy that a gate must notice."""

    file: str
    text: str | None = None
    old: str | None = None
    new: str | None = None


@dataclass(frozen=True)
class Gate:
    """A command to run, the result it must show, and its fix."""

    name: str
    run: str
    fix: str
    tiers: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    number: str | None = None
    least: float | None = None
    most: float | None = None
    timeout_s: float = 600.0
    expect: str = ""
    plants: tuple[Plant, ...] = ()

    @property
    def against(self) -> str:
        """The required result, in words."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}" if self.most is not None else "exit code 0"


@dataclass(frozen=True)
class Result:
    """A gate's verdict, and the number that was measured, if it has one."""

    gate: Gate
    verdict: Verdict
    outcome: Outcome
    measured: float | None = None
    reason: str = ""


def load(place: Path) -> list[Gate]:
    """Read the gates.

    Raises: ConfigError for a missing file, bad TOML, an unknown key, a gate without a plant, two of one name.
    """
    try:
        rows = tomllib.loads(place.read_text(encoding="utf-8")).get("gate", [])
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing: it lists the gates; run from the project's root") from missing
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{place} must be TOML: {fault}") from fault
    gates = [_gate(row, place) for row in rows]
    names = [gate.name for gate in gates]
    if not gates or len(set(names)) < len(names):
        raise ConfigError(f"{place} must hold gates, each with a name of its own; has {', '.join(names) or 'none'}")
    return gates


def _gate(row: Mapping[str, Any], place: Path) -> Gate:
    name = row.get("name", "a gate without a name")
    known = {one.name for one in fields(Gate)} - {"plants"} | {"plant"}
    unknown = sorted(set(row) - known)
    missing = [key for key in ("name", "run", "fix", "plant", "expect") if not row.get(key)]
    if unknown or missing:
        fault = f"unknown {', '.join(unknown)}" if unknown else f"{', '.join(missing)} missing"
        raise ConfigError(f"{place}: {name}: a gate has {', '.join(sorted(known))}; {fault}")
    if not set(row.get("tiers", ())) <= set(TIERS) or not set(row.get("phases", ())) <= set(PHASES):
        raise ConfigError(f"{place}: {name}: tiers must be among {TIERS}, phases among {PHASES}")
    if ("least" in row or "most" in row) and "number" not in row:
        raise ConfigError(f"{place}: {name}: least and most need `number`, which finds the number in the output")
    try:
        plants = tuple(Plant(**plant) for plant in row["plant"])
        re.compile(row.get("number", ""))
    except (TypeError, re.error) as fault:
        raise ConfigError(f"{place}: {name}: {fault}") from fault
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items() if key != "plant"
    }
    return Gate(**values, plants=plants)


def chosen(gates: Sequence[Gate], tier: int | None, phase: str | None, names: Sequence[str]) -> list[Gate]:
    """Return the gates of a tier and those below it, of a phase, or of names; all if none is asked for.

    Raises: ConfigError for a name that is no gate.
    """
    unknown = sorted(set(names) - {gate.name for gate in gates})
    if unknown:
        raise ConfigError(f"no gate {unknown[0]!r}; there are {', '.join(gate.name for gate in gates)}")
    if tier is not None:
        return [gate for gate in gates if any(one <= tier for one in gate.tiers)]
    if phase is not None:
        return [gate for gate in gates if phase in gate.phases]
    return [gate for gate in gates if not names or gate.name in names]


def judge(gate: Gate, outcome: Outcome) -> Result:
    """Return a gate's verdict from how its command ended and what it printed."""
    measured = None
    if gate.number is not None:
        found = re.findall(gate.number, outcome.output)
        try:
            measured = float(found[-1].replace(",", "")) if found else None
        except (ValueError, AttributeError) as fault:
            return Result(gate, "not measured", outcome, None, f"no number in {found[-1]!r}: {fault}")
    if outcome.verdict != "passed":
        return Result(gate, outcome.verdict, outcome, measured, outcome.reason)
    if gate.number is not None and measured is None:
        return Result(gate, "not measured", outcome, None, f"{gate.number!r} is not in the output")
    if measured is not None and not _holds(gate, measured):
        return Result(gate, "failed", outcome, measured, f"{measured:g}, {gate.against} wanted")
    return Result(gate, "passed", outcome, measured)


def _holds(gate: Gate, measured: float) -> bool:
    above = gate.least is None or measured >= gate.least
    return above and (gate.most is None or measured <= gate.most)


def run_gates(gates: Sequence[Gate], root: Path) -> Iterator[Result]:
    """Run the gates and yield each result."""
    for gate in gates:
        yield judge(gate, run(gate.run, root, gate.timeout_s))


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield the table: verdict, gate, measured, against what, seconds; and the remedy where a gate did not pass."""
    width = max((len(result.gate.name) for result in results), default=0)
    for result in results:
        measured = "-" if result.measured is None else f"{result.measured:g}"
        yield (
            f"{result.verdict:<12} {result.gate.name:<{width}}  {measured:>9}  {result.gate.against:<16}"
            f" {result.outcome.elapsed_s:7.1f} s"
        )
        if result.verdict != "passed":
            yield f"             {result.reason or 'see its output'}; fix: {result.gate.fix}"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return the table with each measured number."""
    verdicts = [result.verdict for result in results]
    return {
        "verdict": "failed" if "failed" in verdicts else "not measured" if "not measured" in verdicts else "passed",
        "gates": [
            {
                "name": result.gate.name, "verdict": result.verdict, "measured": result.measured,
                "least": result.gate.least, "most": result.gate.most, "elapsed_s": round(result.outcome.elapsed_s, 2),
                "run": result.gate.run, "reason": result.reason, "fix": result.gate.fix,
            }
            for result in results
        ],
    }  # fmt: skip

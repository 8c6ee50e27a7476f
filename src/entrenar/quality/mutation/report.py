"""Report the verdicts on mutants: scores, the report, the survivors with an argument, and the gate.

    score  = killed / (killed + survived)
    strict = killed by an assertion / (all with a verdict - killed by a crash)

A mutant that dies of a shape error says little about the tests, hence the second figure. A survivor is a gap in the
tests, or argued equivalent (or unreachable where the tests run) in `equivalents.toml`. It stays in the score all the
same; what the argument buys is that the gate lets it live.
"""

import fnmatch
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, GateFailed
from entrenar.quality.mutation.mutants import OPERATORS_VERSION
from entrenar.quality.mutation.verdicts import Verdict
from entrenar.quality.risk import Component

MOST_WITHOUT_VERDICT = 2.0


@dataclass(frozen=True)
class Argued:
    """One entry of equivalents.toml: which survivors it means, and why no test can kill them."""

    file: str
    function: str
    code: str
    original: str
    mutated: str
    verdict: str
    why: str
    occurrence: int | None = None

    def means(self, mutant: Verdict) -> bool:
        """True for a mutant that this entry speaks of."""
        same = all(getattr(self, k) == getattr(mutant, k) for k in ("file", "function", "code", "original", "mutated"))
        return same and self.occurrence in (None, mutant.occurrence)


def load_argued(path: Path) -> list[Argued]:
    """Read equivalents.toml; none if the file is missing.

    Raises: ConfigError for bad TOML, an unknown or missing key, an unknown verdict, or a reason of a word.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
        argued = [Argued(**row) for row in rows]
    except FileNotFoundError:
        return []
    except (tomllib.TOMLDecodeError, TypeError) as fault:
        names = ", ".join(field.name for field in fields(Argued))
        raise ConfigError(f"{path}: each [[mutant]] has {names}; {fault}") from fault
    for entry in argued:
        if entry.verdict not in ("equivalent", "unreachable"):
            raise ConfigError(f'{path}: verdict must be "equivalent" or "unreachable", got {entry.verdict!r}')
        if len(entry.why.split()) < 4:
            raise ConfigError(
                f"{path}: {entry.function}: say why no test can kill {entry.mutated!r}, got {entry.why!r}"
            )
    return argued


@dataclass(frozen=True)
class Score:
    """Counts of one file or of several."""

    killed: int
    survived: int
    timeouts: int
    errors: int
    killed_by_crash: int

    @property
    def total(self) -> int:
        """All mutants."""
        return self.killed + self.survived + self.timeouts + self.errors

    @property
    def percent(self) -> float:
        """Killed of those with a verdict."""
        decided = self.killed + self.survived
        return 100 * self.killed / decided if decided else 0.0

    @property
    def strict_percent(self) -> float:
        """Killed by an assertion, of those that did not crash."""
        decided = self.killed + self.survived - self.killed_by_crash
        return 100 * (self.killed - self.killed_by_crash) / decided if decided else 0.0

    @property
    def percent_without_verdict(self) -> float:
        """Timeouts and errors of all."""
        return 100 * (self.timeouts + self.errors) / self.total if self.total else 0.0


def score(verdicts: Sequence[Verdict]) -> Score:
    """Count verdicts."""
    by = Counter(verdict.status for verdict in verdicts)
    crashes = sum(verdict.how == "crash" for verdict in verdicts)
    return Score(by["killed"], by["survived"], by["timeout"], by["error"], crashes)


def by_file(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Group verdicts, files in order of appearance."""
    files: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        files.setdefault(verdict.file, []).append(verdict)
    return files


def summary(verdicts: Sequence[Verdict], argued: Sequence[Argued]) -> dict[str, Any]:
    """Return the figures of all and of each file, in the words of pmat's report."""
    return {
        "operators_version": OPERATORS_VERSION,
        **_figures(verdicts, argued),
        "files": {name: _figures(group, argued) for name, group in by_file(verdicts).items()},
    }


def _figures(verdicts: Sequence[Verdict], argued: Sequence[Argued]) -> dict[str, Any]:
    counts = score(verdicts)
    return {
        "total_mutants": counts.total,
        "killed": counts.killed,
        "survived": counts.survived,
        "survived_but_argued": sum(v.status == "survived" and any(e.means(v) for e in argued) for v in verdicts),
        "timeouts": counts.timeouts,
        "errors": counts.errors,
        "killed_by_crash": counts.killed_by_crash,
        "mutation_score": round(counts.percent, 2),
        "strict_score": round(counts.strict_percent, 2),
    }


def report(
    name: str, verdicts: Sequence[Verdict], argued: Sequence[Argued], threshold: float | None, *, failures_only: bool
) -> Iterator[str]:
    """Yield the lines of one file's report."""
    yield f"Mutating {name}"
    for verdict in verdicts:
        if verdict.status != "killed" or not failures_only:
            yield f"  {_line(verdict, argued)}"
    counts = score(verdicts)
    decided = counts.killed + counts.survived
    yield ""
    yield f"Mutation Score: {counts.percent:.1f}% ({counts.killed} killed / {decided} total)"
    yield f"Strict score: {counts.strict_percent:.1f}% (without the {counts.killed_by_crash} killed by a crash)"
    if threshold is not None:
        yield f"Target: {threshold:g}% - {'PASS ✅' if counts.percent >= threshold else 'FAIL ❌'}"


def _line(verdict: Verdict, argued: Sequence[Argued]) -> str:
    place = f"{verdict.file}:{verdict.line}"
    change = f"{verdict.original} → {verdict.mutated}"
    if verdict.status == "killed":
        return f"✅ {place}: KILLED by {verdict.killed_by.rpartition('::')[2]} ({change})"
    if verdict.status != "survived":
        return f"⏱️ {place}: NO VERDICT, {verdict.status} {verdict.reason} ({change})"
    for entry in argued:
        if entry.means(verdict):
            word = "SKIPPED (unreachable)" if entry.verdict == "unreachable" else "EQUIVALENT"
            return f"⏭️ {place}: {word}: {entry.why} ({change})"
    return f"❌ {place}: SURVIVED (add missing test!) {verdict.function}: {verdict.code} ({change})"


def demand_score(verdicts: Sequence[Verdict], components: Sequence[Component], argued: Sequence[Argued]) -> None:
    """Hold the verdicts against the floors.

    Raises: GateFailed naming every floor that is missed, every survivor nobody argues, every argument without survivor.
    """
    faults: list[str] = []
    for component in components:
        own: list[Verdict] = []
        for pattern in component.files:
            found = [verdict for verdict in verdicts if fnmatch.fnmatch(verdict.file, pattern)]
            faults += _too_low(pattern, found, component.mutation)
            own += found
        faults += _undecided(component.name, own)
    faults += [
        f"{v.file}:{v.line}: survived: {v.code} ({v.original} → {v.mutated}); kill it, or argue it in equivalents.toml"
        for v in verdicts
        if v.status == "survived" and not any(entry.means(v) for entry in argued)
    ]
    mutated = {verdict.file for verdict in verdicts}
    for entry in argued:
        if entry.file in mutated and not any(entry.means(v) and v.status == "survived" for v in verdicts):
            faults.append(
                f"equivalents.toml: no survivor is {entry.function}: {entry.code} → {entry.mutated}; delete it"
            )
        if entry.verdict == "unreachable" and any(entry.means(v) and not v.reason for v in verdicts):
            faults.append(f"equivalents.toml: {entry.function}: {entry.code} is reached by tests, so not unreachable")
    if faults:
        raise GateFailed("\n".join(faults))


def _too_low(pattern: str, found: Sequence[Verdict], floor: float | None) -> Iterator[str]:
    if not found:
        yield f"{pattern}: no mutant was tried; was the file moved?"
        return
    counts = score(found)
    if floor is not None and counts.percent < floor:
        yield f"{pattern}: mutation score {counts.percent:.2f} %, at least {floor:g} % wanted"


def _undecided(name: str, found: Sequence[Verdict]) -> Iterator[str]:
    counts = score(found)
    if counts.percent_without_verdict > MOST_WITHOUT_VERDICT:
        yield (
            f"{name}: {counts.timeouts} timeouts and {counts.errors} errors are "
            f"{counts.percent_without_verdict:.1f} % without a verdict, at most {MOST_WITHOUT_VERDICT:g} % may be"
        )

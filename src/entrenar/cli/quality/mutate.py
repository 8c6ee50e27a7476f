"""`entrenar quality mutate`: plant mutants and count those that the tests kill."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from entrenar.errors import ConfigError
from entrenar.quality.mutation import report as mutation_report
from entrenar.quality.mutation import verdicts as mutation
from entrenar.quality.risk import RISK_FILE, Component, Risk, load_risk

_ARGUED, _RESULTS = Path("quality/equivalents.toml"), Path("quality/results/mutation.json")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument(
        "--target", action="append", metavar="PATH", help="a file or component; default: all with a floor"
    )
    parser.add_argument(
        "--tests", action="append", metavar="PATH", help="tests for a target that risk.toml does not name"
    )
    parser.add_argument("--threshold", type=float, metavar="PERCENT", help="least score, instead of risk.toml's")
    parser.add_argument("--output-format", choices=("text", "json"), default="text")
    parser.add_argument("--failures-only", action="store_true", help="leave killed mutants out of the text")
    parser.add_argument("--fail-on-threshold", action="store_true", help="end with 1 if a floor is missed")
    parser.add_argument("--fresh", action="store_true", help="try all mutants again, whatever is known")
    parser.add_argument("--known-only", action="store_true", help="run nothing: report what the last run found")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="components at a time")
    parser.add_argument("--minutes", type=float, metavar="N", help="then stop; mutants not tried keep what is known")
    parser.set_defaults(check=_mutate)


def _mutate(parsed: argparse.Namespace) -> int:
    root: Path = parsed.project
    components = _chosen(parsed, load_risk(root / RISK_FILE) if (root / RISK_FILE).is_file() else None)
    argued = mutation_report.load_argued(root / _ARGUED)
    before = mutation.read_verdicts(root / _RESULTS)
    verdicts = _known(before, components) if parsed.known_only else _run(parsed, root, components, before, argued)
    if parsed.output_format == "json":
        print(json.dumps(mutation_report.summary(verdicts, argued), indent=1))
    else:
        floors = {path: component.mutation for component in components for path in component.files}
        for name, group in mutation_report.by_file(verdicts).items():
            print(
                *mutation_report.report(name, group, argued, floors[name], failures_only=parsed.failures_only),
                "",
                sep="\n",
            )
    if parsed.fail_on_threshold:
        mutation_report.demand_score(verdicts, components, argued)
    return 0


def _run(
    parsed: argparse.Namespace,
    root: Path,
    components: Sequence[Component],
    before: list[mutation.Verdict],
    argued: list[mutation_report.Argued],
) -> list[mutation.Verdict]:
    os.nice(19)
    known = [] if parsed.fresh else before
    project = mutation.Project(root)
    until = math.inf if parsed.minutes is None else time.monotonic() + 60 * parsed.minutes
    found: list[mutation.Verdict] = []
    fresh: list[mutation.Verdict] = []  # also those of a component that was interrupted
    try:
        for batch in _batches(components, parsed.jobs):
            found += mutation.mutate(project, batch, known, jobs=parsed.jobs, until=until, on_verdict=_ticking(fresh))
    finally:
        done = {verdict.file for verdict in found}
        rest = mutation.merged(before, fresh)
        everything = [verdict for verdict in rest if verdict.file not in done] + found
        mutation.write_verdicts(root / _RESULTS, everything, mutation_report.summary(everything, argued))
        print(file=sys.stderr)
    return found


def _batches(components: Sequence[Component], size: int) -> list[Sequence[Component]]:
    return [components[start : start + size] for start in range(0, len(components), size)]


def _ticking(kept: list[mutation.Verdict]) -> Callable[[mutation.Verdict], None]:
    def tick(verdict: mutation.Verdict) -> None:
        kept.append(verdict)
        print({"killed": ".", "survived": "S"}.get(verdict.status, "?"), end="", file=sys.stderr, flush=True)

    return tick


def _known(before: list[mutation.Verdict], components: Sequence[Component]) -> list[mutation.Verdict]:
    files = {path for component in components for path in component.files}
    return [verdict for verdict in before if verdict.file in files]


def _chosen(parsed: argparse.Namespace, risk: Risk | None) -> list[Component]:
    """Return the components to mutate, narrowed to the targets, with the floor that the command line asks for."""
    rows = [] if risk is None else [component for component in risk.components if component.mutation is not None]
    if parsed.target is None:
        if not rows:
            raise ConfigError(f"--target FILE is needed where {RISK_FILE} gives no component a mutation floor")
        return [_with(row, row.files, parsed.threshold) for row in rows]
    chosen = []
    for target in parsed.target:
        named = [_with(row, row.files, parsed.threshold) for row in rows if row.name == target]
        holding = [_with(row, (target,), parsed.threshold) for row in rows if target in row.files]
        stranger = Component(target, (target,), tuple(parsed.tests or ("tests",)), mutation=parsed.threshold)
        chosen += named or holding or [stranger]
    return chosen


def _with(row: Component, files: tuple[str, ...], threshold: float | None) -> Component:
    floor = row.mutation if threshold is None else threshold
    return Component(row.name, files, row.tests, row.line, row.branch, floor, row.critical)

"""`entrenar quality risk`: hold measured coverage against the floors of each component."""

import argparse
from pathlib import Path

from entrenar.quality.risk import (
    CERTIFICATES_FILE,
    RISK_FILE,
    coverage_floors,
    demand,
    gradient_floors,
    load_risk,
    read_coverage,
)  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument(
        "--coverage", type=Path, default=Path("coverage.json"), metavar="FILE", help="what `coverage json` wrote"
    )
    parser.add_argument("--critical", action="store_true", help="only the components marked critical")
    parser.set_defaults(check=_risk)


def _risk(parsed: argparse.Namespace) -> int:
    risk = load_risk(parsed.project / RISK_FILE)
    floors = coverage_floors(risk, read_coverage(parsed.coverage), critical_only=parsed.critical)
    floors += gradient_floors(risk, parsed.project / CERTIFICATES_FILE, critical_only=parsed.critical)
    for floor in floors:
        verdict = "ok  " if floor.holds else "FAIL"
        print(
            f"{verdict} {floor.what:<44} {floor.kind:<9} {floor.measured:6.2f} {floor.unit}  (at least {floor.floor:g})"
        )
    demand(
        floors,
        "write the tests that reach the missing lines (`coverage report --show-missing` names them); "
        "`make certificates` checks gradients",
    )
    return 0

"""`entrenar quality check-quality`: hold the scores of files against the grades that are demanded."""

import argparse
from pathlib import Path

from entrenar.cli.quality.output import demand_whole
from entrenar.errors import ConfigError, GateFailed
from entrenar.quality.debt import check, formula, rules
from entrenar.quality.debt.scoring import score_path


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("--path", type=Path, default=Path(), metavar="PATH", help="a file or a folder (default: here)")
    parser.add_argument("--min-grade", metavar="GRADE", help="of every file, besides what the rules demand")
    parser.add_argument("--fail-on-violation", action="store_true", help="end with 1 if a file is below")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="paths to leave out")
    parser.set_defaults(check=_check)


def _check(parsed: argparse.Namespace) -> int:
    demanded = rules.load(parsed.project)
    if parsed.min_grade is not None:
        formula.least_score(parsed.min_grade)
    elif demanded == rules.Rules(exclude=demanded.exclude):
        raise ConfigError(f"no grade is demanded: pass --min-grade, or set min_grade in {rules.RULES_FILE}")
    tree = score_path(parsed.path, parsed.project, [*demanded.exclude, *parsed.exclude])
    found = check.violations(tree, demanded, parsed.min_grade)
    for violation in found:
        print(f"FAIL {violation}")
    if found and parsed.fail_on_violation:
        raise GateFailed(f"{len(found)} of {len(tree.files)} files and means are below their grade")
    demand_whole(tree)
    if not found:
        print(f"ok   {len(tree.files)} files, mean {tree.score:.2f} {formula.grade(tree.score or 0.0)}")
    return 0

"""`entrenar quality check-regression`: hold the scores of a tree against its baseline."""

import argparse
from pathlib import Path

from entrenar.cli.quality.output import demand_whole
from entrenar.errors import ConfigError, GateFailed
from entrenar.quality.debt import baseline, measure, rules
from entrenar.quality.debt.scoring import score_path


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=f"default: {rules.BASELINE_FILE}, or the rules'")
    parser.add_argument("--path", type=Path, metavar="PATH", help="a file or a folder (default: the baseline's)")
    parser.add_argument("--max-score-drop", type=float, metavar="POINTS", help="default: the rules', or 5.0")
    parser.add_argument("--fail-on-regression", action="store_true", help="end with 1 if a score fell further")
    parser.set_defaults(check=_check)


def _check(parsed: argparse.Namespace) -> int:
    demanded = rules.load(parsed.project)
    limit = demanded.drop if parsed.max_score_drop is None else parsed.max_score_drop
    if not 0 <= limit <= 100:
        raise ConfigError(f"--max-score-drop must be within 0 and 100, got {limit}")
    before = baseline.read(parsed.baseline or parsed.project / (demanded.baseline or rules.BASELINE_FILE))
    path = parsed.path or parsed.project / before.path
    tree = score_path(path, parsed.project, demanded.exclude)
    demand_whole(tree)
    found = baseline.compare(before, baseline.from_tree(tree, measure.scorer(), before.path))
    violations = found.violations(limit)
    print(f"{found.tree.what}: {found.tree.before:.2f} then, {found.tree.now:.2f} now (at most {limit:g} less)")
    for drop in sorted(found.fell, key=lambda drop: -drop.points):
        verdict = "FAIL" if drop in violations else "    "
        print(f"{verdict} {drop.what}: {drop.before:.2f} -> {drop.now:.2f} (-{drop.points:.2f})")
    for drop in found.added:
        verdict = "FAIL" if drop in violations else "    "
        print(f"{verdict} {drop.what}: new, {drop.now:.2f}; the tree's baseline is {drop.before:.2f}")
    if found.removed:
        print(f"     no longer there: {', '.join(found.removed)}")
    if violations and parsed.fail_on_regression:
        worst = violations[0]
        raise GateFailed(
            f"{worst.what} fell by {worst.points:.2f} points, at most {limit:g} allowed; "
            f"`entrenar quality tdg --explain {path}` says what costs most"
        )
    return 0

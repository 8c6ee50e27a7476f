"""`entrenar quality baseline create`: keep the scores of a tree, to compare with later."""

import argparse
from pathlib import Path

from entrenar.quality.debt import baseline, formula, measure, rules
from entrenar.quality.debt.scoring import root_of, score_path


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("action", choices=("create",), help="create: score the tree and write its scores")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {rules.BASELINE_FILE}, or the rules'")
    parser.add_argument("--path", type=Path, default=Path(), metavar="PATH", help="a file or a folder (default: here)")
    parser.set_defaults(check=_create)


def _create(parsed: argparse.Namespace) -> int:
    demanded = rules.load(parsed.project)
    place = parsed.output or parsed.project / (demanded.baseline or rules.BASELINE_FILE)
    name = parsed.path.resolve().relative_to(root_of(parsed.path, parsed.project)).as_posix()
    made = baseline.from_tree(score_path(parsed.path, parsed.project, demanded.exclude), measure.scorer(), name)
    baseline.write(made, place)
    print(f"{place}: {len(made.files)} files, mean {made.score:.2f} {formula.grade(made.score)}")
    return 0

"""`entrenar quality tdg PATH`: score technical debt, and say what each finding costs."""

import argparse
from pathlib import Path

from entrenar.cli.quality.output import demand_whole, emit
from entrenar.quality import git
from entrenar.quality.debt import formula, measure, report, rules
from entrenar.quality.debt.score import TreeScore
from entrenar.quality.debt.scoring import score_path


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("path", type=Path, nargs="?", default=Path(), metavar="PATH", help="a file or a folder")
    parser.add_argument("--format", choices=("text", "json", "sarif"), default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--explain", action="store_true", help="print the formula, and what each finding cost")
    parser.add_argument("--functions", action="store_true", help="rank functions instead of files")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="how many to print (default: 10)")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="paths to leave out")
    parser.add_argument("--with-git-context", action="store_true", help="add commit, branch and uncommitted changes")
    parser.set_defaults(check=_tdg)


def _tdg(parsed: argparse.Namespace) -> int:
    demanded = rules.load(parsed.project)
    tree = score_path(parsed.path, parsed.project, [*demanded.exclude, *parsed.exclude])
    context = git_context(parsed.path) if parsed.with_git_context else None
    emit(_rendered(parsed, tree, context), parsed.output)
    demand_whole(tree)
    return 0


def _rendered(parsed: argparse.Namespace, tree: TreeScore, context: dict[str, str | None] | None) -> str:
    if parsed.format == "sarif":
        return report.dumps(report.as_sarif(tree))
    if parsed.format == "json":
        fields = report.as_json(tree, measure.scorer())
        fields |= {"formula": formula.explanation()} if parsed.explain else {}
        return report.dumps(fields | ({"git": context} if context else {}))
    lines = [*formula.explanation(), ""] if parsed.explain else []
    lines += report.as_text(tree, worst=parsed.worst, functions=parsed.functions, findings=parsed.explain)
    lines += [f"{key} {value}" for key, value in (context or {}).items() if value]
    return "\n".join(lines)


def git_context(path: Path) -> dict[str, str | None]:
    """Return commit, branch, and the hash of what is not committed."""
    repository = git.at(path)
    return {"commit": repository.head(), "branch": repository.branch(), "dirty": repository.dirty_hash()}

"""`entrenar quality history`: the scores at commits, tags and checkpoints, read from git's objects."""

import argparse
from pathlib import Path

from entrenar.cli.quality.output import emit
from entrenar.errors import ConfigError, NotMeasured
from entrenar.quality import git
from entrenar.quality.debt import measure, report, rules
from entrenar.quality.git import Commit, Repository
from entrenar.quality.history import checkpoints, plot
from entrenar.quality.history.points import as_json, as_text, points


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--commit", action="append", metavar="REV", help="a revision, tag or checkpoint; repeatable")
    which.add_argument("--range", metavar="A..B", help="the commits after A up to B")
    which.add_argument("--since", metavar="REV", help="the commits after REV")
    parser.add_argument("--path", type=Path, default=Path(), metavar="PATH", help="a file or a folder (default: here)")
    parser.add_argument("--touching", action="store_true", help="only commits that change --path")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where checkpoints are looked up"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the scores too (png, svg, pdf)")
    parser.set_defaults(check=_history)


def _history(parsed: argparse.Namespace) -> int:
    repository = git.at(parsed.project)
    exclude = rules.load(parsed.project).exclude
    commits = _commits(parsed, repository)
    if not commits:
        raise ConfigError(f"{parsed.range or f'{parsed.since}..HEAD'} holds no commit")
    found = list(points(repository, commits, parsed.path, parsed.project, exclude))
    if parsed.format == "json":
        emit(report.dumps(as_json(found, measure.scorer(), parsed.path.as_posix())), parsed.output)
    else:
        emit("\n".join(as_text(found)), parsed.output)
    if parsed.plot is not None:
        plot.draw(found, f"technical-debt score of {parsed.path.as_posix()}", parsed.plot)
    if all(point.tree.score is None for point in found):
        raise NotMeasured(f"{parsed.path} has no Python code at any of these commits")
    return 0


def _commits(parsed: argparse.Namespace, repository: Repository) -> list[tuple[Commit, str | None]]:
    if parsed.commit is None:
        selection = parsed.range or f"{repository.resolve(parsed.since)}..HEAD"
        touched = [(parsed.project / parsed.path).resolve().relative_to(repository.root).as_posix()]
        return [(commit, None) for commit in repository.commits([selection], touched if parsed.touching else [])]
    rows: list[tuple[Commit, str | None]] = []
    for name in parsed.commit:
        named = checkpoints.resolve(repository, name, parsed.runs)
        (commit,) = repository.commits(["--max-count=1", named.commit])
        rows.append((commit, f"{name} (and changes that were not committed)" if named.is_dirty else name))
    return rows

"""`entrenar quality roadmap`: make a roadmap from a specification, or run the commands of its criteria."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from entrenar.cli.quality.output import emit
from entrenar.errors import ConfigError, GateFailed, NotMeasured
from entrenar.quality.commands import Outcome, run
from entrenar.quality.debt.report import dumps
from entrenar.quality.roadmap import plan, specification
from entrenar.quality.roadmap.plan import Criterion


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", type=Path, metavar="FILE", help="a specification in Markdown: print its roadmap")
    what.add_argument(
        "--check", dest="roadmap", type=Path, metavar="FILE", help="a roadmap: run each criterion's command"
    )
    parser.add_argument("--commands", type=Path, metavar="FILE", help="TOML with the criteria's commands")
    parser.add_argument("--repository", default="", metavar="OWNER/NAME", help="on GitHub, if it has one")
    parser.add_argument("--prefix", default="ENT-LLAMA", metavar="WORD", help="of the ids (default: ENT-LLAMA)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="ids that begin so; repeatable")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds for one command")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of --check")
    parser.set_defaults(check=_roadmap)


def _roadmap(parsed: argparse.Namespace) -> int:
    if parsed.roadmap is None:
        heading = plan.Heading(parsed.spec.as_posix(), parsed.repository, parsed.prefix)
        made = plan.roadmap(specification.read(parsed.spec), heading, plan.commands(parsed.commands))
        emit(plan.dump(made).rstrip("\n"), parsed.output)
        return 0
    criteria = [one for one in plan.load(parsed.roadmap) if one.id.startswith(tuple(parsed.only) or "")]
    if not criteria:
        raise ConfigError(f"{parsed.roadmap} has no criterion whose id begins with {' or '.join(parsed.only)}")
    rows = []
    for criterion in criteria:
        rows.append((criterion, _outcome(criterion, parsed.project, parsed.timeout)))
        if parsed.format == "text" and parsed.output is None:
            print(_line(*rows[-1]), flush=True)
    if parsed.format == "json":
        emit(dumps(_fields(rows)), parsed.output)
    elif parsed.output is not None:
        emit("\n".join(_line(*row) for row in rows), parsed.output)
    return _verdict(rows)


def _outcome(criterion: Criterion, project: Path, timeout_s: float) -> Outcome:
    if criterion.verify is None:
        return Outcome("not measured", 0.0, "", "no command")
    return run(criterion.verify, project, timeout_s)


def _line(criterion: Criterion, outcome: Outcome) -> str:
    why = outcome.reason
    if outcome.verdict == "failed":
        why = outcome.tail().rpartition("\n")[2][:160]
    return f"{outcome.verdict:<12} {criterion.id:<20} {criterion.text}" + (f"\n{'':13}{why}" if why else "")


def _fields(rows: Sequence[tuple[Criterion, Outcome]]) -> dict[str, object]:
    return {
        "counts": dict(_counts(rows)),
        "criteria": [
            {"id": one.id, "text": one.text, "verify": one.verify, "verdict": outcome.verdict,
             "reason": outcome.reason, "elapsed_s": round(outcome.elapsed_s, 2)}
            for one, outcome in rows
        ],
    }  # fmt: skip


def _counts(rows: Sequence[tuple[Criterion, Outcome]]) -> Iterator[tuple[str, int]]:
    for verdict in ("passed", "failed", "not measured"):
        yield verdict, sum(outcome.verdict == verdict for _, outcome in rows)


def _verdict(rows: Sequence[tuple[Criterion, Outcome]]) -> int:
    counts = dict(_counts(rows))
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    if counts["failed"]:
        raise GateFailed(f"of {len(rows)} criteria: {said}")
    if counts["not measured"]:
        raise NotMeasured(f"of {len(rows)} criteria: {said}")
    print(f"{said}")
    return 0

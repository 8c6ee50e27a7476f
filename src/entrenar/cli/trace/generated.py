"""The flags of `trace run` for generated code: maps to the lines that a person wrote, and the generator's decisions."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from entrenar.errors import DataError
from entrenar.trace.backends import OnCalls
from entrenar.trace.decisions import Decision, logs_in, read_decisions
from entrenar.trace.generated_code import load_maps
from entrenar.trace.records import Process, SystemCall
from entrenar.trace.source_map import SourceMap


def add(group: argparse._ArgumentGroup) -> None:
    """Add the flags."""
    group.add_argument(
        "--source-map", "--transpiler-map", type=Path, action="append", default=[], metavar="MAP",
        help="show the lines that generated code was made from: a source map (version 1 or 3), a notebook next to its "
        "export, Cython's C, a debug folder of torch.compile; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--trace-transpiler-decisions", type=Path, nargs="?", const=Path(), metavar="LOG",
        help="keep a generator's decisions in the trace ([DECISION] and [RESULT] lines; *.decisions.log here)",
    )  # fmt: skip


def maps(parsed: argparse.Namespace) -> SourceMap | None:
    """Return the maps that the command names as one; None if it names none.

    Raises: FormatError, DataError.
    """
    return load_maps(parsed.source_map) if parsed.source_map else None


def decisions(parsed: argparse.Namespace) -> list[Decision]:
    """Return the decisions of the logs that the command asks for, and say how many there are.

    Raises: DataError for a log that is not there; FormatError for a line in another form.
    """
    asked: Path | None = parsed.trace_transpiler_decisions
    if asked is None:
        return []
    if not asked.exists():
        raise DataError(f"a decision log must be a file, and there is none at {asked}")
    logs = logs_in(asked) if asked.is_dir() else [asked]
    found = [
        decision
        for log in logs
        for decision in read_decisions(log.read_text(encoding="utf-8").splitlines(), name=str(log))
    ]
    names = ", ".join(map(str, logs)) or "no *.decisions.log here"
    print(f"[entrenar trace: {len(found)} decisions of a code generator ({names})]", file=sys.stderr)
    return found


def at_origin(maps: SourceMap | None, take: OnCalls) -> OnCalls:
    """Return a `take` that gets calls with their frames where a person wrote them."""
    if maps is None:
        return take

    def moved(calls: Sequence[SystemCall], processes: Mapping[int, Process]) -> None:
        take(maps.moved(calls), processes)

    return moved

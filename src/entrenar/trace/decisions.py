"""Read the log in which a code generator says what it decided, and why (`--trace-transpiler-decisions`).

The format is the Rust tool's: `[DECISION] category::name input={"json": …}`, and later, if at all,
`[RESULT] name = {"json": …}`. Other lines belong to somebody else and are skipped.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError
from entrenar.trace.records import Mark

_DECISION = re.compile(r"\[DECISION\] (?P<category>\w+)::(?P<name>[\w:]+) input=(?P<input>.+)")
_RESULT = re.compile(r"\[RESULT\] (?P<name>[\w:]+) = (?P<result>.+)")


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a code generator, on line `line` of its log; `result` is None until the log says it."""

    category: str
    name: str
    input: Any
    line: int
    result: Any = None

    def __str__(self) -> str:
        text = f"{self.category}::{self.name} {json.dumps(self.input)}"
        return text if self.result is None else f"{text} -> {json.dumps(self.result)}"


def read_decisions(lines: Iterable[str], *, name: str = "the decision log") -> list[Decision]:
    """Return the decisions of a log, in order; a result belongs to the last decision of its name without one.

    Raises: FormatError for a [DECISION] or [RESULT] line in another form, or a result without a decision.
    """
    decisions: list[Decision] = []
    waiting: dict[str, list[int]] = {}
    for number, text in enumerate(lines, 1):
        place = f"{name}, line {number}"
        if text.startswith("[DECISION]"):
            match = _matched(_DECISION, text, place, "[DECISION] category::name input={…}")
            waiting.setdefault(match["name"], []).append(len(decisions))
            decisions.append(Decision(match["category"], match["name"], _json(match["input"], place), number))
        elif text.startswith("[RESULT]"):
            match = _matched(_RESULT, text, place, "[RESULT] name = {…}")
            if not waiting.get(match["name"]):
                raise FormatError(f"{place}: a result must follow its decision, but {match['name']!r} is not waiting")
            index = waiting[match["name"]].pop()
            decisions[index] = replace(decisions[index], result=_json(match["result"], place))
    return decisions


def _matched(pattern: re.Pattern[str], text: str, place: str, form: str) -> re.Match[str]:
    match = pattern.fullmatch(text.rstrip())
    if match is None:
        raise FormatError(f"{place}: must have the form {form}, got {text.rstrip()!r:.80}")
    return match


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}: must hold JSON, got {text!r:.60}: {error}") from error


def logs_in(folder: Path) -> list[Path]:
    """Return the decision logs of a folder: files called *.decisions.log."""
    return sorted(folder.glob("*.decisions.log"))


def marks(decisions: Iterable[Decision], *, at_ns: int) -> list[Mark]:
    """Return decisions as instants of a trace, all at `at_ns`: a log carries no times."""
    return [Mark("decision", str(decision), at_ns) for decision in decisions]

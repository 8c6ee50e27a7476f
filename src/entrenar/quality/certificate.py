"""Write one certificate per operation: proofs, measurements, planted faults and coverage, each backed by a test run.

The tests write what they showed as {operation: {kind: [figures, …]}}; mutants come from the mutation results, lines and
branches from coverage. Missing measurements are marked. A new certificate must not be worse than the old one in proved
statements, counts, bounds of errors, kill rate, coverage; old measurements must be repeated. Figures that differ
between machines are shown and not compared.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError, GateFailed
from entrenar.quality.mutation.report import by_file, score
from entrenar.quality.mutation.verdicts import read_verdicts
from entrenar.quality.risk import read_coverage

NOT_MEASURED = "not measured"
# Figures of a run and a machine, which are no part of a statement.
_OF_A_RUN = {"seconds", "relative", "roundings", "sqnr_db", "differing", "products", "when_frozen", "threshold"}
# A kill rate is a share of a few hundred mutants: one more or less is no loss. Some drawn cases are passed over.
_RATE_SLACK, _CASES_SLACK = 0.5, 0.1
_SHARES = ("score", "line", "branch")

Shown = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
Certificate = dict[str, Any]


def certificates(
    shown: Shown, mutants: Mapping[str, Any], covered: Mapping[str, Any], source: Callable[[str], str]
) -> dict[str, Certificate]:
    """Put together what is known of each operation; `source` gives the path of an operation's file."""
    found = {}
    for op, kinds in sorted(shown.items()):
        path = source(op)
        found[op] = {
            "derivation": list(kinds.get("derivation", ())),
            "proved": [row for row in kinds.get("shapes", ()) if "statement" in row],
            "gradcheck": _gradchecks(kinds.get("gradcheck", ())),
            "error": _errors(kinds.get("error", ())),
            "properties": _properties(kinds.get("property", ())),
            "behavior": list(kinds.get("behavior", ())),
            "wrong_backwards_refused": len({json.dumps(row, sort_keys=True) for row in kinds.get("controls", ())}),
            "mutants": mutants.get(path, NOT_MEASURED),
            "coverage": covered.get(path, NOT_MEASURED),
        }
    return found


def _gradchecks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each method how many cases it passed, and its worst relative error if it has one."""
    methods: dict[str, Any] = {}
    for row in rows:
        method = methods.setdefault(row["method"], {"cases": 0})
        method["cases"] += 1
        if "relative" in row:
            method["worst_relative"] = max(method.get("worst_relative", 0.0), row["relative"])
    return methods


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each dtype the worst error against float64, in roundings of that dtype."""
    dtypes: dict[str, Any] = {}
    for row in rows:
        if "roundings" in row:
            name = row["dtype"].removeprefix("torch.")
            worst = dtypes.setdefault(name, {"worst_roundings": 0.0, "bound": row["bound"], "least_sqnr_db": 1e9})
            worst["bound"] = max(worst["bound"], row["bound"])
            worst["worst_roundings"] = max(worst["worst_roundings"], round(row["roundings"], 3))
            worst["least_sqnr_db"] = min(worst["least_sqnr_db"], round(row["sqnr_db"], 1))
        elif "relative" in row:
            worst = dtypes.setdefault(f"float64 against {row['against']}", {"worst_relative": 0.0})
            worst["worst_relative"] = max(worst["worst_relative"], row["relative"])
    return dtypes


def _properties(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {"count": len({row["test"] for row in rows}), "cases": sum(row["cases"] for row in rows)}


def mutants_of(results: Path) -> dict[str, Any]:
    """Return the counts of each mutated file; none if nothing was mutated yet."""
    found = {}
    for name, verdicts in by_file(read_verdicts(results)).items():
        counts = score(verdicts)
        found[name] = {
            "killed": counts.killed,
            "survived": counts.survived,
            "without_verdict": counts.timeouts + counts.errors,
            "score": round(counts.percent, 2),
        }
    return found


def coverage_of(path: Path) -> dict[str, Any]:
    """Return the percentages of each measured file; none if coverage was not measured."""
    if not path.is_file():
        return {}
    return {
        name: {"line": round(covered.line, 2), "branch": round(covered.branch, 2)}
        for name, covered in read_coverage(path).items()
    }


def worse(old: Mapping[str, Certificate], new: Mapping[str, Certificate]) -> list[str]:
    """Return the parts of an old certificate that the new one no longer shows."""
    losses = []
    for op, before in old.items():
        after = new.get(op)
        if after is None:
            losses.append(f"{op}: no test shows anything of it any more")
            continue
        for kind in ("derivation", "proved", "behavior"):
            left = {_statement(row) for row in before[kind]} - {_statement(row) for row in after[kind]}
            losses += [f"{op}: {kind} no longer shown: {statement}" for statement in sorted(left)]
        losses += [f"{op}: {loss}" for loss in (*_fewer(before, after), *_wider(before["error"], after["error"]))]
    return losses


def _statement(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in _OF_A_RUN}, sort_keys=True)


def _fewer(before: Certificate, after: Certificate) -> Iterator[str]:
    """Describe which counts fell, and which measurements are missing now."""
    counts = [
        ("wrong backwards refused", before["wrong_backwards_refused"], after["wrong_backwards_refused"]),
        ("properties", before["properties"]["count"], after["properties"]["count"]),
        ("drawn cases", (1 - _CASES_SLACK) * before["properties"]["cases"], after["properties"]["cases"]),
    ]
    for method, figures in before["gradcheck"].items():
        counts.append((f"cases of {method}", figures["cases"], after["gradcheck"].get(method, {}).get("cases", 0)))
    for kind in ("mutants", "coverage"):
        was, now = before[kind], after[kind]
        if was != NOT_MEASURED and now == NOT_MEASURED:
            yield f"{kind} no longer measured"
        elif was != NOT_MEASURED:
            counts += [(f"{kind}, {name}", was[name], now[name]) for name in _SHARES if name in was]
    for what, least, found in counts:
        if found < least - (_RATE_SLACK if what == "mutants, score" else 0):
            yield f"{what} fell from {least:g} to {found:g}"


def _wider(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Describe which errors are no longer bounded, or less tightly."""
    for dtype, was in before.items():
        if dtype not in after:
            yield f"error in {dtype} no longer shown"
        elif "bound" in was and after[dtype].get("bound", math.inf) > was["bound"]:
            yield f"bound of the error in {dtype} rose from {was['bound']:g} to {after[dtype].get('bound', math.inf):g}"


def demand_no_loss(committed: Path, new: Mapping[str, Certificate]) -> None:
    """Compare with the committed certificates.

    Raises:
        FormatError: they are missing or malformed.
        GateFailed: something is no longer shown.
    """
    try:
        old = json.loads(committed.read_text(encoding="utf-8"))["operations"]
        losses = worse(old, new)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise FormatError(
            f"{committed} holds no certificates ({fault!r}); write them by `make certificates`"
        ) from fault
    if losses:
        raise GateFailed("\n".join([*losses, f"fix it, or write new certificates to {committed} and say why"]))

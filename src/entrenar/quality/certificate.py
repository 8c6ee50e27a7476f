"""One certificate for each operation: what was proved, measured, planted and reached, each from a run that shows it.

The tests write what they showed as {operation: {kind: [figures, …]}}; mutants come from the mutation results, lines and
branches from coverage. What was not measured says so. Two certificates are compared by what must not get worse: proved
statements, counts, kill rate. Figures that differ between machines are shown and not compared.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError, GateFailed
from entrenar.quality.mutation import read_verdicts
from entrenar.quality.mutation_report import by_file, score
from entrenar.quality.risk import read_coverage

NOT_MEASURED = "not measured"
# Figures of a run and a machine, which are no part of a statement.
_OF_A_RUN = {"seconds", "relative", "roundings", "sqnr_db", "differing", "products", "when_frozen", "threshold"}
# A kill rate is a share of a few hundred mutants: one of them more or less is no loss.
_RATE_SLACK = 0.5

Shown = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
Certificate = dict[str, Any]


def certificates(
    shown: Shown, mutants: Mapping[str, Any], covered: Mapping[str, Any], source: str
) -> dict[str, Certificate]:
    """Put together what is known of each operation; `source` is the path of an operation's file, with {op} in it."""
    found = {}
    for op, kinds in sorted(shown.items()):
        path = source.format(op=op)
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
    """Return for each method how many cases it passed and the worst relative error, where it has one."""
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
    """Say what of an old certificate the new one no longer shows."""
    losses = []
    for op, before in old.items():
        after = new.get(op)
        if after is None:
            losses.append(f"{op}: no test shows anything of it any more")
            continue
        for kind in ("derivation", "proved", "behavior"):
            left = {_statement(row) for row in before[kind]} - {_statement(row) for row in after[kind]}
            losses += [f"{op}: {kind} no longer shown: {statement}" for statement in sorted(left)]
        losses += [
            f"{op}: {what} fell from {was:g} to {now:g}"
            for what, was, now in _counts(before, after)
            if now < was - (_RATE_SLACK if what == "mutation score" else 0)
        ]
    return losses


def _statement(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in _OF_A_RUN}, sort_keys=True)


def _counts(before: Certificate, after: Certificate) -> list[tuple[str, float, float]]:
    """Return (what, before, after) of each count that both have."""
    counts = [
        ("wrong backwards refused", before["wrong_backwards_refused"], after["wrong_backwards_refused"]),
        ("properties", before["properties"]["count"], after["properties"]["count"]),
        ("methods of checking gradients", len(before["gradcheck"]), len(after["gradcheck"])),
        ("dtypes bounded", len(before["error"]), len(after["error"])),
    ]
    if NOT_MEASURED not in (before["mutants"], after["mutants"]):
        counts.append(("mutation score", before["mutants"]["score"], after["mutants"]["score"]))
    if NOT_MEASURED not in (before["coverage"], after["coverage"]):
        counts += [
            (f"{kind} coverage", before["coverage"][kind], after["coverage"][kind]) for kind in ("line", "branch")
        ]
    return counts


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
        raise GateFailed("\n".join([*losses, f"mend it, or write new certificates to {committed} and say why"]))

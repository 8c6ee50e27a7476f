"""The score of a tree in text, JSON and SARIF. Each is the same for the same tree, wherever and whenever it is made."""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from entrenar.quality.debt import formula
from entrenar.quality.debt.score import FileScore, Finding, TreeScore
from entrenar.version import __version__

SCHEMA = 1
_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_SARIF_ERROR_POINTS = 2.0  # a finding that costs this much is an error, one of half as much a warning


def as_text(tree: TreeScore, *, worst: int, functions: bool, findings: bool) -> Iterator[str]:
    """Yield lines: the tree, then its worst files or functions, then what cost most in each of those files."""
    value = tree.score
    lines = sum(file.code_lines for file in tree.files)
    total = "not measured" if value is None else f"{value:.1f} {formula.grade(value)}"
    yield f"score {total}   {len(tree.files)} files, {lines:,} code lines"
    if tree.files:
        means = {part: formula.mean(file.lost[part] for file in tree.files) for part in formula.WEIGHTS}
        yield "lost, as a mean of the files: " + ", ".join(f"{part} {points:.1f}" for part, points in means.items())
    ranked = sorted(tree.files, key=lambda file: (file.score, file.path))
    if functions:
        every = sorted((one.score, file.path, one.line, one.name) for file in tree.files for one in file.functions)
        yield from (_row(score, f"{path}:{line} {name}") for score, path, line, name in every[:worst])
    else:
        for file in ranked[:worst]:
            yield _row(file.score, file.path)
            if findings:
                yield from _costs(file)
    yield from (f"not measured {path}:{gap.line}: {gap.reason}" for path, gap in tree.unmeasured.items())
    if tree.generated:
        yield f"passed over, since a program wrote them: {', '.join(tree.generated)}"


def _row(score: float, what: str) -> str:
    return f"{score:6.1f} {formula.grade(score):<2} {what}"


def _costs(file: FileScore) -> Iterator[str]:
    ranked = sorted(file.findings, key=lambda finding: (-file.cost(finding), finding.line))
    yield from (f"       -{file.cost(one):.2f}  line {one.line}: {one.text} ({one.rule})" for one in ranked)


def score_fields(value: float | None) -> dict[str, Any] | None:
    """Return a score as JSON has it, rounded to what a reader can use; None where nothing was measured."""
    return None if value is None else {"total": round(value, 4), "grade": formula.grade(value)}


def as_json(tree: TreeScore, scorer: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that was measured."""
    return {
        "schema": SCHEMA,
        "scorer": dict(scorer),
        "score": score_fields(tree.score),
        "files": [_file_fields(file) for file in tree.files],
        "not_measured": [
            {"path": path, "line": gap.line, "reason": gap.reason} for path, gap in tree.unmeasured.items()
        ],
        "generated": list(tree.generated),
    }


def _file_fields(file: FileScore) -> dict[str, Any]:
    return {
        "path": file.path,
        "score": score_fields(file.score),
        "code_lines": file.code_lines,
        "lost": {part: round(points, 4) for part, points in file.lost.items()},
        "findings": [_finding_fields(file, finding) for finding in file.findings],
        "functions": [
            {"name": one.name, "line": one.line, "score": score_fields(one.score)} for one in file.functions
        ],
    }  # fmt: skip


def _finding_fields(file: FileScore, finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "part": finding.part,
        "line": finding.line,
        "value": finding.value,
        "debt": round(finding.debt, 4),
        "cost": round(file.cost(finding), 4),
        "text": finding.text,
    }


def as_sarif(tree: TreeScore) -> dict[str, Any]:
    """Return the findings as SARIF 2.1.0, for code hosts that show them next to the lines."""
    rules = [
        {
            "id": name,
            "shortDescription": {"text": f"{rule.unit}, {rule.rate:g} points a unit above {rule.limit:g}"},
            "properties": {"part": rule.part},
        }
        for name, rule in formula.RULES.items()
    ]
    driver = {"name": "entrenar quality tdg", "version": __version__, "rules": rules}
    notes = [
        {"level": "error", "message": {"text": gap.reason}, "locations": [_location(path, gap.line)]}
        for path, gap in tree.unmeasured.items()
    ]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not notes, "toolExecutionNotifications": notes}],
        "results": [_result(file, finding) for file in tree.files for finding in file.findings],
    }
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(file: FileScore, finding: Finding) -> dict[str, Any]:
    cost = file.cost(finding)
    level = "error" if cost >= _SARIF_ERROR_POINTS else "warning" if cost >= _SARIF_ERROR_POINTS / 2 else "note"
    return {
        "ruleId": finding.rule,
        "level": level,
        "message": {"text": f"{finding.text}: costs {cost:.2f} points"},
        "locations": [_location(file.path, finding.line)],
    }


def _location(path: str, line: int) -> dict[str, Any]:
    return {"physicalLocation": {"artifactLocation": {"uri": quote(path)}, "region": {"startLine": line}}}


def dumps(value: Any) -> str:
    """Return JSON text, the same bytes for the same value."""
    return json.dumps(value, indent=2, allow_nan=False)

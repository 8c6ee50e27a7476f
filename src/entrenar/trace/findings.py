"""One conclusion of a diagnosis, and how it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A person reads the first few; a machine that is busy all the time gives a hundred.
_TOLD = 8


@dataclass(frozen=True)
class Finding:
    """A problem, the figures that show it, and the next step.

    `share` is the part of the run's time that it explains, 0 to 1; `spans` are ids to open in the viewer.
    """

    kind: str
    title: str
    evidence: tuple[str, ...]
    next_step: str
    share: float
    spans: tuple[int, ...] = ()


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings for a person, the most costly first."""
    if not findings:
        return ["Diagnosis: nothing stands out"]
    text = ["Diagnosis:"]
    for number, finding in enumerate(findings[:_TOLD], 1):
        text.append(f"  {number}. {finding.title}")
        text += [f"       {evidence}" for evidence in finding.evidence]
        if finding.spans:
            text.append(f"       open: {', '.join(f'span {span:016x}' for span in finding.spans)}")
        text.append(f"     -> {finding.next_step}")
    if len(findings) > _TOLD:
        text.append(f"  {len(findings) - _TOLD} more findings, each of less weight: --format json lists them")
    return text


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings as plain values."""
    return [
        {
            "kind": finding.kind,
            "title": finding.title,
            "share": round(finding.share, 4),
            "evidence": list(finding.evidence),
            "next_step": finding.next_step,
            "spans": [f"{span:016x}" for span in finding.spans],
        }
        for finding in findings
    ]

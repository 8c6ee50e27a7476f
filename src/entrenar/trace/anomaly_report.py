"""Report the anomaly detector's findings to a person or a program: lines as events end, a report at the end.

Both forms of the specification are here: section 4.3 (line with baseline, report with one row a severity) and the
short one of its appendix A (line without baseline, totals in one row).
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from entrenar.trace.anomaly import HIGH_SIGMA, MEDIUM_SIGMA, WARM_UP, Detector, Shift
from entrenar.trace.records import Anomaly, Frame, Severity

_BADGES: Mapping[Severity, str] = {"high": "🔴 High", "medium": "🟡 Medium", "low": "🟢 Low"}
_MEANINGS: Mapping[Severity, str] = {"high": "likely hardware issues", "medium": "investigate", "low": "noise"}
TITLE = "=== Real-Time Anomaly Detection Report ==="


def line(anomaly: Anomaly, *, short: bool = False) -> str:
    """Return the line that is printed as the event ends; the Python line follows where it is known.

    `short` leaves the baseline out, as appendix A does.
    """
    place = f"  {place_of(anomaly.frame)}" if anomaly.frame else ""
    if anomaly.kind == "shift":
        return (
            f"⚠️ SHIFT: {anomaly.operation} went from {_us(anomaly.baseline_ns)} µs to {_us(anomaly.duration_ns)} µs "
            f"and stays there{place}"
        )
    baseline = "" if short else f" from baseline {anomaly.baseline_ns / 1e3:.1f} µs"
    return (
        f"⚠️ ANOMALY: {anomaly.operation} took {anomaly.duration_ns / 1e3:.0f} µs ({anomaly.sigma:.1f}σ{baseline})"
        f" - {_BADGES[anomaly.severity]}{place}"
    )


def place_of(frame: Frame) -> str:
    """Return `[finetune.py:42 in load_dataset]`."""
    return f"[{PurePath(frame.file).name}:{frame.line} in {frame.function}]"


def report(detector: Detector, *, short: bool = False) -> str:
    """Return the report on everything the detector saw; the totals of the severities add up to the first line."""
    counts = detector.counts
    total = sum(counts.values())
    lines = [TITLE]
    if short:
        parts = ", ".join(f"{counts[severity]} {severity.title()}" for severity in _BADGES)
        lines.append(f"Total anomalies: {total} ({parts})")
    else:
        lines += [f"Total anomalies detected: {total}", "Severity Distribution:", *_bands(detector)]
    lines += [_shift_line(shift) for shift in detector.shifts]
    lines.append(
        f"Judged {detector.judged:,} events; "
        f"{detector.learned:,} more taught it what is normal, the first {WARM_UP} of each kind"
    )
    return "\n".join(lines)


def _bands(detector: Detector) -> list[str]:
    lowest = detector.sensitivity.threshold
    edges: dict[Severity, str] = {"high": f">{max(HIGH_SIGMA, lowest):.1f}σ"}
    if lowest < HIGH_SIGMA:
        edges["medium"] = f"{max(MEDIUM_SIGMA, lowest):g}-{HIGH_SIGMA:g}σ"
    if lowest < MEDIUM_SIGMA:
        edges["low"] = f"{lowest:g}-{MEDIUM_SIGMA:g}σ"
    labels = {severity: f"{_BADGES[severity]} ({edge}):" for severity, edge in edges.items()}
    width = max(map(len, labels.values()))
    return [
        f"  {label:<{width}} {detector.counts[severity]:>2} anomalies ({_MEANINGS[severity]})"
        for severity, label in labels.items()
    ]


def _shift_line(shift: Shift) -> str:
    began = shift.began
    until = "until the end" if shift.ended_ns is None else f"for {(shift.ended_ns - began.at_ns) / 1e9:.3f} s"
    return (
        f"Level shift: {began.operation} went from {_us(began.baseline_ns)} µs to {_us(began.duration_ns)} µs {until}"
        f" ({shift.events:,} events)"
    )


def _us(duration_ns: float) -> str:
    return f"{duration_ns / 1e3:,.1f}"


def as_json(detector: Detector) -> dict[str, Any]:
    """Return the report as plain values, durations in µs."""
    return {
        "threshold_sigma": detector.sensitivity.threshold,
        "method": detector.method,
        "warm_up_events": WARM_UP,
        "events_judged": detector.judged,
        "events_learned": detector.learned,
        "total": sum(detector.counts.values()),
        "severity": dict(detector.counts),
        "anomalies": [anomaly_json(anomaly) for anomaly in detector.anomalies],
        "shifts": [
            anomaly_json(shift.began) | {"events": shift.events, "ended_ns": shift.ended_ns}
            for shift in detector.shifts
        ],
    }


def anomaly_json(anomaly: Anomaly) -> dict[str, Any]:
    """Return one anomaly as plain values, durations in µs."""
    frame = anomaly.frame
    return {
        "operation": anomaly.operation,
        "kind": anomaly.kind,
        "at_ns": anomaly.at_ns,
        "duration_us": anomaly.duration_ns / 1e3,
        "baseline_us": anomaly.baseline_ns / 1e3,
        "sigma": round(anomaly.sigma, 3),
        "severity": anomaly.severity,
        "source": None if frame is None else {"file": frame.file, "line": frame.line, "function": frame.function},
        "path": anomaly.path,
    }


class Quiet:
    """Lets one anomaly of each operation through per second, so that a broken disk does not flood the terminal.

    A shift always passes, and so does one that took more than twice as long as the last that passed. The next line
    gives the number held back; the report counts everything.
    """

    def __init__(self, interval_ns: int = 1_000_000_000) -> None:
        self._interval_ns = interval_ns
        self._last: dict[str, Anomaly] = {}
        self._held: dict[str, int] = {}

    def line(self, anomaly: Anomaly, *, short: bool = False) -> str | None:
        """Return the line to print, None to print nothing."""
        name = anomaly.operation
        last = self._last.get(name)
        is_soon = last is not None and anomaly.at_ns - last.at_ns < self._interval_ns
        is_worse = last is not None and anomaly.duration_ns > 2 * last.duration_ns
        if anomaly.kind == "point" and is_soon and not is_worse:
            self._held[name] = self._held.get(name, 0) + 1
            return None
        self._last[name] = anomaly
        held = self._held.pop(name, 0)
        more = f"  (and {held} of {name} since the last line)" if held else ""
        return line(anomaly, short=short) + more

"""Judge a run as an experienced person would: each finding comes with its evidence and a next step.

Rules, not a model: every one names the figures that it rests on, and says nothing where they are missing.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from entrenar.report.history import History
from entrenar.runs import ROUTINE_EVENTS

_SPIKE = 6.0  # median absolute deviations of the steps around
_AROUND = 50
_FALLING = 0.01  # of the loss, over the last quarter of the evaluations
_WAITING, _SAVING = 0.15, 0.15  # shares of the time
_SLOWER = 0.75


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know, most serious first: "fault", "advice" or "good"."""

    kind: str
    what: str
    evidence: str
    advice: str


def findings(history: History) -> list[Finding]:
    """Return what the run's figures say, faults first."""
    order = {"fault": 0, "advice": 1, "good": 2}
    found = [finding for rule in _RULES for finding in rule(history)]
    return sorted(found, key=lambda finding: order[finding.kind])


def _not_finite(history: History) -> Iterator[Finding]:
    broken = [record.step for record in history.records if not math.isfinite(record.loss)]
    if broken:
        yield Finding(
            "fault",
            "The loss was not finite.",
            f"first at step {broken[0]:,}, at {len(broken):,} recorded steps",
            f"resume from a checkpoint before step {broken[0]:,} with a lower learning rate",
        )


def _spikes(history: History) -> Iterator[Finding]:
    """Losses far above the median of the steps around them (Hampel 1974)."""
    records = [record for record in history.records if math.isfinite(record.loss)]
    losses = [record.loss for record in records]
    steps = []
    for index in range(_AROUND, len(losses)):
        around = losses[index - _AROUND : index]
        center = statistics.median(around)
        spread = 1.4826 * statistics.median(abs(value - center) for value in around)
        if losses[index] > center + _SPIKE * spread and losses[index] > 1.05 * center:
            steps.append(records[index].step)
    if steps:
        rate = max(record.lr for record in records)
        yield Finding(
            "advice",
            "The loss spikes.",
            f"{len(steps):,} of the drawn steps, first step {steps[0]:,}; the peak learning rate was {rate:.1e}",
            f"if it does not recover, try {rate / 2:.1e} or a longer warm-up",
        )


def _overfitting(history: History) -> Iterator[Finding]:
    best, last = history.best, history.evaluations[-1] if history.evaluations else None
    if best is None or last is None or last.held_out is None or best.held_out is None:
        return
    if last.step > best.step and last.held_out["loss"] > 1.02 * best.held_out["loss"] and last.loss < best.loss:
        yield Finding(
            "advice",
            "The model overfits.",
            f"held-out loss rose from {best.held_out['loss']:.4f} (step {best.step:,}) to {last.held_out['loss']:.4f}, "
            f"while the training loss fell from {best.loss:.4f} to {last.loss:.4f}",
            "train for fewer epochs, on more data, or with early_stop_patience; the best checkpoint is kept",
        )


def _undertrained(history: History) -> Iterator[Finding]:
    known = [record for record in history.evaluations if record.held_out]
    if len(known) < 4:
        return
    quarter = known[-max(2, len(known) // 4) :]
    first, last = (record.held_out["loss"] for record in (quarter[0], quarter[-1]) if record.held_out)
    if last < first * (1 - _FALLING):
        yield Finding(
            "advice",
            "The held-out loss was still falling at the last evaluation.",
            f"from {first:.4f} at step {quarter[0].step:,} to {last:.4f} at step {quarter[-1].step:,}",
            "train longer: the same command with --resume and a higher limit",
        )


def _waiting(history: History) -> Iterator[Finding]:
    total = math.fsum(history.phase_s.values())
    for phase, limit, what, advice in (
        ("data", _WAITING, "The step waits for data.", "prepare the corpus in advance, on a faster disk"),
        ("checkpoint", _SAVING, "Saving takes a large share of the time.", "raise checkpoint.save_every"),
    ):
        share = history.phase_s.get(phase, 0.0) / total if total else 0.0
        if share > limit:
            yield Finding("advice", what, f"{share:.0%} of the time is in phase {phase}", advice)


def _slower(history: History) -> Iterator[Finding]:
    rates = [record.targets_per_s for record in history.records]
    if len(rates) < 20:
        return
    early, late = (statistics.median(part) for part in (rates[: len(rates) // 4], rates[-len(rates) // 4 :]))
    if late < _SLOWER * early:
        yield Finding(
            "advice",
            "The run became slower.",
            f"{early:,.0f} tokens/s in its first quarter, {late:,.0f} in its last",
            "look for another process, heat, or a full disk; `entrenar trace run` shows where the time goes",
        )


def _alarms(history: History) -> Iterator[Finding]:
    for event in history.events:
        if event.kind not in ROUTINE_EVENTS:
            yield Finding(
                "advice", f"{event.kind.replace('_', ' ').capitalize()}.", f"step {event.step:,}", event.message
            )


def _good(history: History) -> Iterator[Finding]:
    best = history.best
    if best is not None and best.held_out is not None and best.step == history.evaluations[-1].step:
        yield Finding(
            "good",
            "The last evaluation is the best.",
            f"held-out loss {best.held_out['loss']:.4f} at step {best.step:,}",
            "the newest checkpoint is the one to use",
        )


_RULES: tuple[Callable[[History], Iterator[Finding]], ...] = (
    _not_finite, _spikes, _overfitting, _undertrained, _waiting, _slower, _alarms, _good,
)  # fmt: skip

"""Put histories into one HTML file that needs no network: the figures as JSON, uPlot for the charts, our own few lines.

Whatever comes from a run (names, prompts, messages) is escaped: by jinja2 in the text, and in the JSON by writing `<`
as an escape, so that no data can end the script element (HTML Standard, 4.12.1.3).
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from entrenar.report.findings import findings
from entrenar.report.history import History, differences, median_rate
from entrenar.version import __version__


def render(histories: Sequence[History]) -> str:
    """Return the page of one run, or of several, compared.

    Raises: ValueError for no run.
    """
    if not histories:
        raise ValueError("a report needs at least one run, got none")
    assets = resources.files("entrenar.report").joinpath("assets")
    read = {name: assets.joinpath(name).read_text(encoding="utf-8") for name in _ASSETS}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(read["page.html"])
    return page.render(
        title=", ".join(history.name for history in histories),
        version=__version__,
        runs=[_summary(history) for history in histories],
        differences=differences(histories) if len(histories) > 1 else [],
        data=_json([_series(history) for history in histories]),
        **{name.replace(".", "_"): text for name, text in read.items() if name != "page.html"},
    )


_MOST_SESSIONS = 40
_ASSETS = ("page.html", "page.css", "page.js", "uPlot.iife.min.js", "uPlot.min.css")


def _summary(history: History) -> dict[str, Any]:
    """Return what the top of the page says in words."""
    best, last = history.best, history.last
    total = math.fsum(history.phase_s.values())
    return {
        "name": history.name,
        "folder": str(history.folder),
        "steps": f"{history.num_steps:,}",
        "targets": f"{last.targets:,}",
        "hours": duration(last.elapsed_s),
        "rate": f"{median_rate(history.records):,.0f}",
        "loss": f"{history.smooth[-1]:.4f}",
        "best": "not measured" if best is None or best.held_out is None else f"{best.held_out['loss']:.4f}",
        "best_step": "" if best is None else f"at step {best.step:,}",
        "is_cut": history.is_cut,
        "findings": findings(history),
        "phases": [
            (name, duration(seconds), round(100 * seconds / total, 1) if total else 0.0)
            for name, seconds in sorted(history.phase_s.items(), key=lambda item: -item[1])
        ],
        "events": history.events[-200:],
        "num_events": len(history.events),
        "saved": [
            (f"{one.step:,}", f"{one.size_bytes / 1e6:,.1f} MB", one.held_out_loss, one.git_revision)
            for one in history.saved
        ],
        "config": _toml_like(history.config),
        "sessions": [_session(one) for one in history.sessions[-_MOST_SESSIONS:]],
    }


def _session(line: Mapping[str, Any]) -> str:
    """Return a line of sessions.jsonl in words."""
    if line.get("event") == "ended" and isinstance(peak := line.get("peak_bytes"), int):
        return f"{line.get('at')}: ended, at most {peak / 1e9:.2f} GB of memory"
    facts = (f"{key.replace('_', ' ')} {value}" for key, value in line.items() if key not in ("at", "event"))
    return f"{line.get('at')}: {line.get('event')}: {', '.join(facts)}"


def _series(history: History) -> dict[str, Any]:
    """Return what is drawn; a number that is not finite is a gap."""
    records = history.records
    held_out = sorted({key for record in history.evaluations for key in record.held_out or {}})
    return {
        "name": history.name,
        "step": [record.step for record in records],
        "loss": [_number(record.loss) for record in records],
        "smooth": [_number(value) for value in history.smooth],
        "lr": [_number(record.lr) for record in records],
        "grad_norm": [_number(record.grad_norm) for record in records],
        "targets_per_s": [_number(record.targets_per_s) for record in records],
        "eval_step": [record.step for record in history.evaluations],
        "held_out": {
            key: [_number((record.held_out or {}).get(key)) for record in history.evaluations] for key in held_out
        },
        "events": [
            [event.step, event.kind, event.message]
            for event in history.events
            if not event.kind.startswith("checkpoint")
        ][-200:],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def duration(seconds: float) -> str:
    """Return seconds in words: 5 s, 3 min 10 s, 2 h 05 min."""
    if seconds < 59.5:
        return f"{round(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _toml_like(config: Any, before: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        rows += _toml_like(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", str(value))]
    return rows

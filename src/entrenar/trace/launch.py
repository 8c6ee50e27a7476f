"""Pass settings through the environment: to a traced program, and to the tracer from its own launcher.

TRACEPARENT is the W3C's and reaches any program. The two others matter only to programs that call the OpenTelemetry
API: OTEL_PYTHON_TRACER_PROVIDER makes the API load our recorder, ENTRENAR_TRACE_SPOOL tells it where to write.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

SPOOL = "ENTRENAR_TRACE_SPOOL"
_PROVIDER_NAME = "entrenar"
_WANTS = "wants.json"
_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Inherited:
    """The trace that a launcher began, or one of our own; `parent` is the launcher's span."""

    trace_id: int
    parent: int | None


@dataclass(frozen=True)
class Wants:
    """The tracer's requests to the program: where spans go, their parent, which groups, the shortest duration.

    `groups` is off, phases, layers or all.
    """

    folder: Path
    trace_id: int
    parent: int
    groups: str = "phases"
    shortest_ns: int = 0


def parse_traceparent(header: str) -> tuple[int, int] | None:
    """Return trace id and span id of a W3C traceparent (Trace Context, level 1); None for one that is invalid."""
    match = _HEADER.fullmatch(header.strip(" \t"))
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    return (trace_id, span_id) if trace_id and span_id else None


def traceparent(trace_id: int, span_id: int) -> str:
    """Return the W3C header of a sampled span."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def inherited(environment: Mapping[str, str]) -> Inherited:
    """Return the trace that TRACEPARENT names, or a new one."""
    found = parse_traceparent(environment.get("TRACEPARENT", ""))
    return Inherited(*found) if found else Inherited(secrets.randbits(128) | 1, None)


def environment(current: Mapping[str, str], program: Path, wants: Wants) -> dict[str, str]:
    """Return the environment for the program, and write the tracer's requests to its folder."""
    (wants.folder / _WANTS).write_text(json.dumps({"groups": wants.groups, "shortest_ns": wants.shortest_ns}))
    told = dict(current, TRACEPARENT=traceparent(wants.trace_id, wants.parent))
    told[SPOOL] = str(wants.folder)
    if wants.groups != "off" and _has_our_packages(program):
        told.setdefault("OTEL_PYTHON_TRACER_PROVIDER", _PROVIDER_NAME)
    return told


def wanted(current: Mapping[str, str]) -> Wants | None:
    """Return what the tracer that started this process wants; None if there is none that listens."""
    folder = Path(current.get(SPOOL) or os.devnull)
    found = parse_traceparent(current.get("TRACEPARENT", ""))
    try:
        values = json.loads((folder / _WANTS).read_text())
        if values["groups"] == "off":
            return None
        return Wants(folder, *(found or (secrets.randbits(128) | 1, 0)), values["groups"], values["shortest_ns"])
    except (OSError, ValueError, KeyError):
        return None


def _has_our_packages(program: Path) -> bool:
    """Return whether a program runs in this Python environment, and the environment knows our provider.

    Another environment's API would fail to load it, so such a program does not hear about it.
    """
    if program.absolute().parent != Path(sys.prefix) / "bin":
        return False
    return bool(entry_points(group="opentelemetry_tracer_provider", name=_PROVIDER_NAME))

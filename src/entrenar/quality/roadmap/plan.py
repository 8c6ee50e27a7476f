"""The roadmap's YAML: made from a specification and from the commands that show its criteria, byte for byte the same.

The commands stand in a file of their own, since a specification does not know them:

    [[criterion]]
    id = "ENT-LLAMA-005-P1-C2"
    text = "Test Coverage ≥ 95%"           # as the specification has it, so that a moved criterion is noticed
    verify = "entrenar quality risk"

A criterion without a command has `verify: null`, and counts as not measured.
"""

import importlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from entrenar.errors import ConfigError, FormatError, MachineError
from entrenar.quality.commands import words_of
from entrenar.quality.roadmap.specification import Epic

VERSION = "1.0"
_PRIORITIES = ("critical", "high", "medium", "low")


@dataclass(frozen=True)
class Criterion:
    """One acceptance criterion of a roadmap."""

    id: str
    text: str
    verify: str | None


@dataclass(frozen=True)
class Heading:
    """The fields above the epics."""

    specification: str
    repository: str
    prefix: str


def commands(place: Path | None) -> dict[str, tuple[str, str]]:
    """Return text and command of each criterion by its id.

    Raises: ConfigError for bad TOML, a row without one of the three, two rows of one id, an unbalanced command.
    """
    if place is None:
        return {}
    try:
        rows = tomllib.loads(place.read_text(encoding="utf-8")).get("criterion", [])
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing: it has the commands of the criteria") from missing
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{place} must be TOML: {fault}") from fault
    found: dict[str, tuple[str, str]] = {}
    for row in rows:
        if set(row) != {"id", "text", "verify"} or row["id"] in found:
            raise ConfigError(f"{place}: a criterion has an id of its own, text and verify, and nothing else: {row}")
        words_of(row["verify"])
        found[row["id"]] = (row["text"], row["verify"])
    return found


def roadmap(epics: Sequence[Epic], heading: Heading, known: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return the roadmap as the YAML has it.

    Raises: ConfigError for a command whose criterion the specification does not have, or has in other words.
    """
    used: set[str] = set()
    items = [_item(epic, heading.prefix, known, used) for epic in epics]
    stale = sorted(set(known) - used)
    if stale:
        raise ConfigError(f"no criterion {stale[0]} ({known[stale[0]][0]!r}) in the specification; correct its id")
    return {
        "roadmap_version": VERSION,
        "generated_from": heading.specification,
        "github_enabled": bool(heading.repository),
        "github_repo": heading.repository or None,
        "roadmap": items,
    }


def _item(epic: Epic, prefix: str, known: Mapping[str, tuple[str, str]], used: set[str]) -> dict[str, Any]:
    name = f"{prefix}-{epic.number:03d}"
    phases = []
    for number, phase in enumerate(epic.phases, 1):
        criteria = []
        for place, text in enumerate(phase.criteria, 1):
            key = f"{name}-P{number}-C{place}"
            said, verify = known.get(key, (text, None))
            if said != text:
                raise ConfigError(f"{key} is {text!r} in the specification, {said!r} where its command stands")
            used.add(key)
            criteria.append({"id": key, "text": text, "verify": verify})
        phases.append({"phase": phase.title, "subtasks": phase.tasks, "acceptance_criteria": criteria})
    return {
        "id": name, "item_type": "epic", "title": epic.title, "status": "planned",
        "priority": _PRIORITIES[min(epic.number - 1, len(_PRIORITIES) - 1)], "phases": phases,
    }  # fmt: skip


def dump(value: Mapping[str, Any]) -> str:
    """Return YAML text, the same bytes for the same roadmap."""
    text = _yaml().safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)
    return f"# Made by `entrenar quality roadmap`; change the specification or the commands, not this file.\n{text}"


def load(place: Path) -> list[Criterion]:
    """Return the criteria of a roadmap's YAML.

    Raises: ConfigError for a missing file; FormatError for one that is no roadmap.
    """
    try:
        table = _yaml().safe_load(place.read_text(encoding="utf-8"))
        found = list(_criteria(table))
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing; `entrenar quality roadmap --spec FILE --output {place}`") from missing
    except (_yaml().YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as fault:
        raise FormatError(f"{place} is no roadmap: {fault!r}") from fault
    if not found or len({one.id for one in found}) < len(found):
        raise FormatError(f"{place} is no roadmap: it needs criteria, each with an id of its own")
    return found


def _criteria(table: Any) -> Iterator[Criterion]:
    if table["roadmap_version"] != VERSION:
        raise KeyError(f"roadmap_version {VERSION}")
    for item in table["roadmap"]:
        for phase in item["phases"]:
            for row in phase["acceptance_criteria"]:
                yield Criterion(str(row["id"]), str(row["text"]), None if row["verify"] is None else str(row["verify"]))


def _yaml() -> ModuleType:
    try:
        return importlib.import_module("yaml")
    except ModuleNotFoundError as missing:
        raise MachineError("a roadmap needs PyYAML, which is missing; pip install 'entrenar[quality]'") from missing

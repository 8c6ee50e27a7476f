"""Read a specification's epics, phases, tasks and criteria from its headings and lists.

An epic is a section of the second level that has tasks or criteria; its phases are the sections below it, or itself.
The list or the sentence after a bold label belongs to what the label says: **Success Criteria:** and **Quality Gates:**
are criteria, **Deliverables:** and **Implementation:** are tasks. Lists of a section whose title speaks of metrics are
criteria. Code blocks and all other text are left out.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from entrenar.errors import ConfigError, FormatError

_CRITERIA = re.compile(r"criteria|quality gates?|acceptance|metrics", re.IGNORECASE)
_TASKS = re.compile(r"deliverables?|implementation|tasks?|subtasks", re.IGNORECASE)
_LABEL = re.compile(r"^\*\*([^*]+?):?\*\*:?\s*")
_NUMBER = re.compile(r"^(\d+)\.\s+")


@dataclass
class Phase:
    """A section of an epic: what is to be done, and what shows that it was."""

    title: str
    tasks: list[str] = field(default_factory=list)
    criteria: list[str] = field(default_factory=list)


@dataclass
class Epic:
    """A section of the specification under its number."""

    number: int
    title: str
    phases: list[Phase]


def read(place: Path) -> list[Epic]:
    """Return the epics of a specification.

    Raises: ConfigError for a missing file; FormatError for text that is not UTF-8, or has no tasks and no criteria.
    """
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError as missing:
        raise ConfigError(f"{place} is missing: a roadmap is made from a specification") from missing
    except UnicodeDecodeError as fault:
        raise FormatError(f"{place} must be UTF-8: {fault}") from fault
    epics = list(_epics(text))
    if not epics:
        raise FormatError(
            f"{place} must have sections (##) with lists after labels such as **Deliverables:** or "
            "**Success Criteria:**; there are none"
        )
    if len({epic.number for epic in epics}) < len(epics):
        raise FormatError(f"{place} must number its sections differently: their numbers are the ids of the roadmap")
    return epics


def _epics(text: str) -> Iterator[Epic]:
    """Yield the epics; a section without a number gets the next that is free."""
    found: list[tuple[str, list[Phase]]] = []
    for level, heading, nodes in _sections(text):
        if level <= 2:
            found.append((heading if level == 2 else "", []))
        phase = _phase(heading, nodes)
        if phase.tasks or phase.criteria:
            found[-1][1].append(phase)
    epics = [(title, phases) for title, phases in found if title and phases]
    numbered = {int(number[1]) for title, _ in epics if (number := _NUMBER.match(title))}
    free = itertools.count(max(numbered, default=0) + 1)
    for title, phases in epics:
        number = _NUMBER.match(title)
        yield Epic(int(number[1]) if number else next(free), _NUMBER.sub("", title), phases)


def _sections(text: str) -> Iterator[tuple[int, str, list[SyntaxTreeNode]]]:
    """Yield level, title and content of each section, down to the fourth level; deeper ones belong to theirs."""
    level, title, nodes = 0, "", list[SyntaxTreeNode]()
    for node in SyntaxTreeNode(MarkdownIt().parse(text)).children:
        if node.type == "heading" and int(node.tag[1]) <= 4:
            yield level, title, nodes
            level, title, nodes = int(node.tag[1]), node.children[0].content.strip(), []
        else:
            nodes.append(node)
    yield level, title, nodes


def _phase(heading: str, nodes: list[SyntaxTreeNode]) -> Phase:
    phase = Phase(heading)
    target = phase.criteria if _CRITERIA.search(heading) else None
    for node in nodes:
        if node.type == "paragraph":
            text = node.children[0].content
            label = _LABEL.match(text)
            if label is None:
                continue
            target = _target(phase, label[1])
            said = " ".join(text[label.end() :].split())
            if target is not None and said:
                target.append(said)
        elif node.type in ("bullet_list", "ordered_list") and target is not None:
            target += _items(node)
    return phase


def _target(phase: Phase, label: str) -> list[str] | None:
    if _CRITERIA.search(label):
        return phase.criteria
    return phase.tasks if _TASKS.search(label) else None


def _items(node: SyntaxTreeNode) -> Iterator[str]:
    """Yield the items of a list; of an item with items of its own only those, under its words."""
    for item in node.children:
        said = " ".join(child.children[0].content for child in item.children if child.type == "paragraph")
        said = " ".join(said.split())
        inner = [child for child in item.children if child.type in ("bullet_list", "ordered_list")]
        if not inner:
            yield said
        for child in inner:
            yield from (f"{said.strip('*')}: {one}" for one in _items(child))

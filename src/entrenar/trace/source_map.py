"""Trace generated code back to the line that a person wrote.

A `SourceMap` holds, for each generated file, which of its lines came from where. A line without an entry belongs to
the nearest entry above it, as one line of a source often makes several. Where a source is itself generated (a notebook,
exported, then transpiled) the chain is followed to its end.

Read here: the specification's version 1, both as the Rust tool parses it and as its book documents it, and the
standard version 3 (ECMA-426), sections included. `generated_code` reads what compilers leave behind without a map.
"""

import bisect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from entrenar.errors import FormatError
from entrenar.files import sha256_file
from entrenar.trace.records import Frame, SystemCall
from entrenar.trace.vlq import decode

_LANGUAGES = {
    ".py": "Python", ".ipynb": "Python", ".pyx": "Cython", ".rs": "Rust", ".c": "C", ".ts": "TypeScript",
    ".js": "JavaScript",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a generated line was written: `note` is the generator's remark, such as an optimization."""

    file: str
    line: int
    function: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        place = f"{PurePath(self.file).name}:{self.line}"
        return f"[{place} in {self.function}]" if self.function else f"[{place}]"


@dataclass
class SourceMap:
    """Origins of generated lines: per generated file, sorted lines and their origins (None: made by no source line).

    `functions` maps names of generated functions to what they were called; `twins` names a generated file by the
    SHA-256 of its content, for code that a compiler caches under a name of its own.
    """

    language: str = "unknown"
    lines: dict[str, list[tuple[int, Origin | None]]] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    _found: dict[str, str | None] = field(default_factory=dict)
    _stacks: dict[tuple[Frame, ...], tuple[Frame, ...]] = field(default_factory=dict)

    def add(self, generated_file: str, line: int, origin: Origin | None) -> None:
        """Record where a generated line came from; the first record for a line counts."""
        entries = self.lines.setdefault(generated_file, [])
        if not entries or entries[-1][0] < line:
            entries.append((line, origin))
            return
        index = bisect.bisect_left(entries, line, key=_line_of)
        if entries[index][0] != line:
            entries.insert(index, (line, origin))

    def origin(self, file: str, line: int) -> Origin | None:
        """Return where a line of a generated file was written; None if the map does not know."""
        generated = self._generated_file(file)
        found = None if generated is None else self._step(generated, line)
        # This ends, because maps that lead in a circle are refused as they are read.
        while found is not None and (further := self._step(found.file, found.line)) is not None:
            found = Origin(further.file, further.line, further.function or found.function, further.note or found.note)
        return found

    def move(self, frame: Frame) -> Frame:
        """Return the frame at its origin, with the generated place kept; return an unmapped frame unchanged."""
        origin = self.origin(frame.file, frame.line)
        if origin is None:
            return frame
        function = origin.function or self.functions.get(frame.function, frame.function)
        return Frame(function, origin.file, origin.line, generated=f"{frame.file}:{frame.line}")

    def moved(self, calls: Iterable[SystemCall]) -> list[SystemCall]:
        """Return system calls with every frame of their stacks at its origin; a stack is looked up once."""
        return [replace(call, stack=self._moved_stack(call.stack)) for call in calls]

    def _moved_stack(self, stack: tuple[Frame, ...]) -> tuple[Frame, ...]:
        known = self._stacks.get(stack)
        if known is None:
            known = self._stacks[stack] = tuple(self.move(frame) for frame in stack)
        return known

    def _step(self, generated: str, line: int) -> Origin | None:
        entries = self.lines.get(generated, [])
        index = bisect.bisect_right(entries, line, key=_line_of) - 1
        return entries[index][1] if index >= 0 else None

    def _generated_file(self, file: str) -> str | None:
        if file in self.lines:
            return file
        if file not in self._found:
            self._found[file] = self._by_suffix(file) or self._by_content(file)
        return self._found[file]

    def _by_suffix(self, file: str) -> str | None:
        """Find the one generated file whose path ends this one's; a map names its files from where it was made."""
        wanted = PurePath(file).parts
        matches = [
            name
            for name in self.lines
            if not PurePath(name).is_absolute() and wanted[-len(PurePath(name).parts) :] == PurePath(name).parts
        ]
        longest = max((len(PurePath(name).parts) for name in matches), default=0)
        matches = [name for name in matches if len(PurePath(name).parts) == longest]
        return matches[0] if len(matches) == 1 else None

    def _by_content(self, file: str) -> str | None:
        if not self.twins or not Path(file).is_file():
            return None
        return self.twins.get(sha256_file(Path(file)))


def label(function: str, file: str, line: int) -> str:
    """Return section 4.5's row of a hot path, `load_dataset (Python:finetune.py:35)`, with the line of the definition.

    `line` stands in where the source is not there to be read, or does not define the function.
    """
    path = Path(file)
    language = _LANGUAGES.get(path.suffix.partition("#")[0], "source")
    return f"{function} ({language}:{path.name}:{_defined_at(path, function) or line})"


def _defined_at(path: Path, function: str) -> int | None:
    name = re.escape(function.rpartition(".")[2])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    definition = re.compile(rf"\s*(?:async\s+)?(?:c?p?def|fn|function)\s+{name}\b")
    return next((number for number, text in enumerate(lines, 1) if definition.match(text)), None)


def _line_of(entry: tuple[int, Origin | None]) -> int:
    return entry[0]


def merged(maps: Iterable[tuple[str, SourceMap]]) -> SourceMap:
    """Put maps together; each comes with the name that an error calls it by.

    Raises: FormatError for two maps that disagree on a line, or maps that lead in a circle.
    """
    whole = SourceMap()
    for name, part in maps:
        for generated, entries in part.lines.items():
            _add_lines(whole, name, generated, entries)
        whole.functions.update(part.functions)
        whole.twins.update(part.twins)
        whole.language = part.language
    _refuse_circles(whole)
    return whole


def _add_lines(whole: SourceMap, name: str, generated: str, entries: Sequence[tuple[int, Origin | None]]) -> None:
    known = dict(whole.lines.get(generated, []))
    for line, origin in entries:
        if known.get(line, origin) != origin:
            raise FormatError(
                f"two source maps must agree on a line: {name} says {origin} for {generated}:{line}, an "
                f"earlier one {known[line]}; pass the map of the newer build only"
            )
        whole.add(generated, line, origin)


def _refuse_circles(maps: SourceMap) -> None:
    """Refuse maps whose files lead back to themselves: no line of them was written by a person."""
    sources = {
        generated: {origin.file for _, origin in entries if origin is not None}
        for generated, entries in maps.lines.items()
    }
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> None:
        if file in path:
            circle = " -> ".join([*path[path.index(file) :], file])
            raise FormatError(f"source maps must lead to a file that a person wrote, but they go round: {circle}")
        if file in done:
            return
        for source in sorted(sources.get(file, ())):
            visit(source, [*path, file])
        done.add(file)

    for generated in sorted(sources):
        visit(generated, [])


# ---- the JSON formats ----


def load_map(path: Path) -> SourceMap:
    """Read one map: version 1 or 3.

    Raises: FormatError that names the file, the field and what it must be; FileNotFoundError.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    # ECMA-426, 8.1: a first line that begins with )]}' keeps browsers from running the map as a script.
    if text.startswith(")]}'"):
        text = text.partition("\n")[2]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} must be a source map in JSON: {error}") from error
    reader = _Reader(path)
    version = reader.field(content, "version", int)
    if version not in (1, 3):
        raise FormatError(f"{path}: version must be 1 or 3, got {version}; make the map again in one of these versions")
    maps = reader.version_1(content) if version == 1 else reader.version_3(content)
    _refuse_circles(maps)
    return maps


class _Reader:
    """Reads the fields of one map file; every error names the file and the field."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def field(self, holder: Any, name: str, kind: type, place: str = "") -> Any:
        """Return a field that must be there."""
        if not isinstance(holder, dict):
            raise FormatError(
                f"{self.path}: {place.rstrip('.') or 'a source map'} must be an object, got {holder!r:.60}"
            )
        value = holder.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "it is missing" if name not in holder else f"got {value!r:.60}"
            words = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}
            raise FormatError(f"{self.path}: {place}{name} must be {words[kind]}, {found}")
        return value

    def line(self, holder: Any, name: str, place: str) -> int:
        """Return a line number."""
        number = int(self.field(holder, name, int, place))
        if number < 1:
            raise FormatError(f"{self.path}: {place}{name} must be >= 1, got {number}")
        return number

    def generated_file(self, name: str) -> str:
        """Return the path of the generated file next to its map, or its given name if there is no such file."""
        beside = self.path.parent / name
        return str(beside.resolve()) if beside.is_file() else name

    def version_1(self, content: dict[str, Any]) -> SourceMap:
        """Read the specification's own format, in both of its forms."""
        maps = SourceMap(self.field(content, "source_language", str))
        for index, entry in enumerate(self.field(content, "mappings", list)):
            place = f"mappings[{index}]."
            if isinstance(entry, dict) and "rust_line" in entry:
                generated = self.field(content, "generated_file", str)
                origin = Origin(
                    self.field(content, "source_file", str),
                    self.line(entry, "python_line", place),
                    entry.get("python_function") or None,
                )
                maps.add(self.generated_file(generated), self.line(entry, "rust_line", place), origin)
            else:
                generated = self.field(entry, "generated_file", str, place)
                origin = Origin(
                    self.field(entry, "original_file", str, place),
                    self.line(entry, "original_line", place),
                    entry.get("original_function") or None,
                    _decision(entry.get("transpiler_decision")),
                )
                maps.add(self.generated_file(generated), self.line(entry, "generated_line", place), origin)
        functions = self.field(content, "function_map", dict) if "function_map" in content else {}
        maps.functions.update({name: str(meant) for name, meant in functions.items()})
        return maps

    def version_3(self, content: dict[str, Any]) -> SourceMap:
        """Read the standard format, with or without sections."""
        name = self.field(content, "file", str) if content.get("file") else self.path.name.removesuffix(".map")
        maps = SourceMap("source")
        if "sections" in content:
            for index, section in enumerate(self.field(content, "sections", list)):
                place = f"sections[{index}]."
                offset = self.field(section, "offset", dict, place)
                first = int(self.field(offset, "line", int, f"{place}offset."))
                self._mappings(maps, name, self.field(section, "map", dict, place), first, f"{place}map.")
        else:
            self._mappings(maps, name, content, 0, "")
        return maps

    def _mappings(self, maps: SourceMap, name: str, content: dict[str, Any], first: int, place: str) -> None:
        root = self.field(content, "sourceRoot", str, place) if content.get("sourceRoot") else ""
        root = root if not root or root.endswith("/") else f"{root}/"
        sources = self.field(content, "sources", list, place)
        generated = self.generated_file(name)
        source = source_line = 0
        for number, text in enumerate(self.field(content, "mappings", str, place).split(";"), 1):
            for segment in filter(None, text.split(",")):
                fields = self._decoded(segment, number, place)
                origin = None
                if len(fields) > 1:
                    source, source_line = source + fields[1], source_line + fields[2]
                    origin = self._v3_origin(sources, root, source, source_line, f"{place}mappings, line {number}")
                maps.add(generated, first + number, origin)

    def _decoded(self, segment: str, line: int, place: str) -> list[int]:
        try:
            fields = decode(segment)
        except ValueError as error:
            raise FormatError(f"{self.path}: {place}mappings, line {line}: {error}") from error
        if len(fields) not in (1, 4, 5):
            raise FormatError(
                f"{self.path}: {place}mappings, line {line}: a segment must have 1, 4 or 5 numbers, "
                f"{segment!r} has {len(fields)}"
            )
        return fields

    def _v3_origin(self, sources: list[Any], root: str, source: int, line: int, place: str) -> Origin | None:
        if not 0 <= source < len(sources):
            raise FormatError(f"{self.path}: {place}: source {source} does not exist, there are {len(sources)}")
        if line < 0:
            raise FormatError(f"{self.path}: {place}: the line of a source must be >= 0, got {line}")
        return None if sources[source] is None else Origin(f"{root}{sources[source]}", line + 1)


def _decision(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    reasoning = value.get("reasoning")
    return f"{value.get('optimization')}" + (f" ({reasoning})" if reasoning else "")

"""Read the segments that recorders write, while they write them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from entrenar.trace.recorder import DROP, END, HEAD, MARK, NEXT_SEGMENT, START, STATUS, SUFFIX
from entrenar.trace.records import Status

_KINDS: dict[int, Literal["start", "end", "drop", "mark"]] = {START: "start", END: "end", DROP: "drop", MARK: "mark"}


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """A span that began, ended, or was dropped; or a mark under it. `text` is the span's name, or the mark's text."""

    kind: Literal["start", "end", "drop", "mark"]
    pid: int
    tid: int
    span: int
    at_ns: int
    parent: int | None = None
    text: str = ""
    status: Status = "unset"
    attributes: dict[str, Any] = field(default_factory=dict)
    ends_with_parent: bool = False


@dataclass
class _Stream:
    """The position up to which a process's records were read."""

    pid: int
    segment: int = 0
    at: int = 0
    data: bytes = b""


class Spool:
    """A folder of segments. Deletes each one that was read to its end, if `is_consuming`."""

    def __init__(self, folder: Path, *, is_consuming: bool = True) -> None:
        self._folder, self._is_consuming = folder, is_consuming
        self._streams: dict[str, _Stream] = {}

    def drain(self) -> list[SpanEvent]:
        """Return all that was recorded since the last call, in the order of each process's records."""
        for entry in os.scandir(self._folder):
            if entry.name.endswith(SUFFIX):
                name = entry.name.rpartition("-")[0]
                if name not in self._streams:
                    self._streams[name] = _Stream(int(name.split("-")[0]), _first_segment(self._folder, name))
        return [event for name in list(self._streams) for event in self._read(name, self._streams[name])]

    def _read(self, name: str, stream: _Stream) -> Iterator[SpanEvent]:
        while True:
            path = self._folder / f"{name}-{stream.segment:06d}{SUFFIX}"
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return
            at = stream.at
            while at + HEAD.size <= len(data):
                size, span, parent, at_ns, tid, status, kind = HEAD.unpack_from(data, at)
                if kind in (0, NEXT_SEGMENT):
                    break
                text = data[at + HEAD.size : at + size].decode("utf-8", "replace")
                yield _event(kind, stream.pid, tid, span, at_ns, parent, text, status)
                at += size
            stream.at = at
            if at + HEAD.size > len(data) or kind != NEXT_SEGMENT:
                return
            if self._is_consuming:
                path.unlink(missing_ok=True)
            stream.segment, stream.at = stream.segment + 1, 0


def _first_segment(folder: Path, name: str) -> int:
    return min(int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*{SUFFIX}"))


def _event(kind: int, pid: int, tid: int, span: int, at_ns: int, parent: int, text: str, status: int) -> SpanEvent:
    if kind == START:
        name, _, rest = text.partition("\0")
        attributes = json.loads(rest) if rest else {}
        return SpanEvent(
            "start", pid, tid, span, at_ns, parent or None, name, attributes=attributes, ends_with_parent=bool(status)
        )
    if kind == END:
        attributes = json.loads(text) if text else {}
        return SpanEvent("end", pid, tid, span, at_ns, status=STATUS[status], attributes=attributes)  # type: ignore[arg-type]
    return SpanEvent(_KINDS[kind], pid, tid, span, at_ns, text=text)

"""Read a trace file, while it is written or later."""

import json
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from entrenar.errors import DataError, FormatError
from entrenar.trace.records import Anomaly, Frame, Mark, Metric, Process, Span, Status, SystemCall, Tally, TraceInfo
from entrenar.trace.schema import VERSION, signed, unsigned

_STATUS: tuple[Status, ...] = ("unset", "ok", "error")


class Reader:
    """A trace file, opened read-only.

    Raises: DataError if there is no such file; FormatError if it is no trace, or a trace of another version.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"a trace must be a file, and {path} is none; write one with `entrenar trace run`")
        self.path = path
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            row = self._db.execute("select value from meta where key = 'version'").fetchone()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise FormatError(f"{path} is not a trace of `entrenar trace run`: {error}") from error
        if row is None or row[0] != str(VERSION):
            self._db.close()
            found = "no version" if row is None else f"version {row[0]}"
            raise FormatError(
                f"{path} must be a trace of version {VERSION}, but has {found}; trace the program again, or read "
                "the file with the entrenar that wrote it"
            )
        self._string = cache(self._read_string)
        self.stack = cache(self._read_stack)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def info(self) -> TraceInfo:
        """Return what the trace is about."""
        row = self._db.execute("select value from meta where key = 'info'").fetchone()
        if row is None:
            raise FormatError(f"{self.path} has no description of its command: the tracer died as it started")
        values: dict[str, Any] = json.loads(row[0])
        values["trace_id"] = int(values["trace_id"], 16)
        values["command"], values["notes"] = tuple(values["command"]), tuple(values["notes"])
        return TraceInfo(**values)

    def processes(self) -> list[Process]:
        """Return all processes, in the order they began."""
        return [Process(*row) for row in self._db.execute("select * from process order by started_ns, pid")]

    def spans(self, *, name: str | None = None) -> Iterator[Span]:
        """Yield spans, in the order they began; only those called `name` if it is given."""
        query = "select span.* from span join string on span.name = string.id where ?1 is null or text = ?1"
        for row in self._db.execute(query + " order by start_ns, end_ns desc", (name,)):
            yield self._span(row)

    def span(self, number: int) -> Span | None:
        """Return the span of an id, None if it is not stored."""
        row = self._db.execute("select * from span where id = ?", (signed(number),)).fetchone()
        return None if row is None else self._span(row)

    def open_spans(self) -> list[Span]:
        """Return the spans that have not ended, outermost first, the processes themselves left out."""
        rows = self._db.execute("select * from span where end_ns is null order by start_ns")
        return [span for span in map(self._span, rows) if not span.name.startswith("process: ")]

    def calls(self, *, span: int | None = None) -> Iterator[SystemCall]:
        """Yield the system calls that were kept, in the order they began; only those under `span` if it is given."""
        query = "select * from call where ?1 is null or span = ?1 order by start_ns"
        for row in self._db.execute(query, (signed(span),)):
            name, pid, tid, start, duration, result, error, size, path, arguments, stack, owner = row
            yield SystemCall(
                name=self._string(name), pid=pid, tid=tid, start_ns=start, duration_ns=duration, result=result,
                error=None if error is None else self._string(error), size_bytes=size,
                path=None if path is None else self._string(path),
                arguments=tuple(int(word, 16) for word in (arguments or "").split()), stack=self.stack(stack),
                span=unsigned(owner),
            )  # fmt: skip

    def tallies(self) -> Iterator[Tally]:
        """Yield the counts of all calls, kept or not."""
        for row in self._db.execute("select * from tally"):
            name, stack, span_name, calls, errors, total, largest, size, slow, histogram = row
            yield Tally(
                self._string(name), self.stack(stack), self._string(span_name) or None, calls, errors, total, largest,
                size, slow, {int(index): count for index, count in json.loads(histogram).items()},
            )  # fmt: skip

    def anomalies(self) -> Iterator[Anomaly]:
        """Yield what the detectors found, in order of time."""
        for row in self._db.execute("select * from anomaly order by at_ns"):
            operation, kind, at, duration, baseline, sigma, severity, pid, tid, span, function, file, line, path = row
            frame = None if function is None else Frame(function, file, line)
            yield Anomaly(
                operation, kind, at, duration, baseline, sigma, severity, pid, tid, unsigned(span), frame, path
            )

    def last_anomalies(self, count: int) -> list[Anomaly]:
        """Return the newest anomalies, newest last."""
        return list(self.anomalies())[-count:]

    def metrics(self, *, name: str | None = None) -> Iterator[Metric]:
        """Yield readings in order of time; only those called `name` if it is given."""
        for number, at_ns, value in self._db.execute("select * from metric order by at_ns"):
            if name is None or self._string(number) == name:
                yield Metric(self._string(number), at_ns, value)

    def marks(self) -> Iterator[Mark]:
        """Yield instants in order of time."""
        for kind, text, at, pid, tid, span in self._db.execute("select * from mark order by at_ns"):
            yield Mark(kind, text, at, pid, tid, unsigned(span))

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        return int(self._db.execute(f"select count(*) from {table}").fetchone()[0])  # noqa: S608 - our own names

    # ---- rows ----

    def _span(self, row: tuple[Any, ...]) -> Span:
        number, parent, name, pid, tid, start, end, status, attributes, links = row
        return Span(
            id=unsigned(number), parent=unsigned(parent), name=self._string(name),
            pid=pid, tid=tid, start_ns=start, end_ns=end, status=_STATUS[status],
            attributes=json.loads(attributes) if attributes else {},
            links=tuple((int(trace, 16), int(other, 16)) for trace, other in json.loads(links or "[]")),
        )  # fmt: skip

    def _read_string(self, number: int) -> str:
        return str(self._db.execute("select text from string where id = ?", (number,)).fetchone()[0])

    def _read_stack(self, number: int) -> tuple[Frame, ...]:
        frames = []
        while number:
            number, frame = self._db.execute("select parent, frame from stack where id = ?", (number,)).fetchone()
            frames.append(self._frame(frame))
        return tuple(frames)

    def _frame(self, number: int) -> Frame:
        query = "select function, file, line, generated from frame where id = ?"
        function, file, line, generated = self._db.execute(query, (number,)).fetchone()
        moved = None if generated is None else self._string(generated)
        return Frame(self._string(function), self._string(file), line, moved)

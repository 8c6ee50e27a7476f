"""Rows of jsonl, JSON, csv, tsv and parquet files, each with the place it stands at; a broken one is a row too.

A row that cannot be read does not end the reading: it is yielded as a `BadRow`, so that a check can list every fault
of a file, with file and line, at once.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import DataError

_TABLES = {".csv": ",", ".tsv": "\t"}
_MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """The fields of a row; `place` is file:line, and the row's number where it is not the first of its line."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, why, and what stands there."""

    place: str
    kind: str
    reason: str
    content: Any

    def __str__(self) -> str:
        """Write it as compilers write faults."""
        return f"{self.place}: {self.reason}"


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row | BadRow]:
    """Yield the rows of a file; `columns` name those of a csv or tsv file that does not begin with their names.

    Raises: DataError for a file that is missing, too large, of an unknown kind, or not readable as a whole.
    """
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json", ".parquet", *_TABLES):
        raise DataError(f"{path} must be a .jsonl, .json, .parquet, .csv or .tsv file")
    if columns and kind not in _TABLES:
        raise DataError(f"columns names those of csv and tsv files; {path} names its own")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file of rows")
    if kind == ".parquet":
        return _parquet(path)
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {_MAX_FILE_BYTES:,} bytes; split it into several files")
    text, fault = _text(path)
    if fault is not None:
        return iter([fault])
    if kind in _TABLES:
        return _table(path, text, columns)
    return _jsonl(path, text) if kind != ".json" else _json(path, text)


def _text(path: Path) -> tuple[str, BadRow | None]:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: byte {data[error.start]:#04x}; convert the file (iconv -f LATIN1 -t UTF-8)"
        return "", BadRow(f"{path}:{line}", "broken", reason, None)


def _row(place: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(place, value)
    return BadRow(place, "broken", f"a row must be a JSON object, got {type(value).__name__}", value)


def _jsonl(path: Path, text: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            yield _row(place, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield BadRow(place, "broken", f"not valid JSON: {error}", line[:1000])


def _json(path: Path, text: str) -> Iterator[Row | BadRow]:
    """Read a list element by element, so that each has a place of its own and those before a fault are not lost."""
    decoder, at, line, counted, number = json.JSONDecoder(), 0, 1, 0, 0
    at = _skip(text, at)
    if text[at : at + 1] != "[":
        yield BadRow(f"{path}:1", "broken", "the file must hold a JSON list of rows", text[:1000])
        return
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        breaks, number = text.count("\n", counted, at), number + 1
        line, counted = line + breaks, at
        place = f"{path}:{line}" if breaks or number == 1 else f"{path}:{line} (row {number})"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield BadRow(
                place, "broken", f"not valid JSON: {error}; the rest of the file is not read", text[at:][:1000]
            )
            return
        yield _row(place, value)
        after = _skip(text, at)
        if text[after : after + 1] not in (",", "]"):
            yield BadRow(place, "broken", "not valid JSON: no comma or ] after this row; the rest is not read", None)
            return
        at = _skip(text, after + (text[after] == ","))


def _skip(text: str, at: int) -> int:
    """Return the place after white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _table(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    delimiter = _TABLES[path.suffix.lower()]
    # A tab-separated file has no quoting: a sentence may begin with a quotation mark.
    lines = io.StringIO(text, newline="")
    reader = (
        csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        if delimiter == "\t"
        else csv.reader(lines, delimiter=delimiter)
    )
    names, before = list(columns), 0
    try:
        for cells in reader:
            place, before = f"{path}:{before + 1}", reader.line_num
            if not names:
                names = cells
            elif len(cells) == len(names):
                yield Row(place, dict(zip(names, cells, strict=True)))
            elif cells:
                reason = f"{len(cells)} cells where there are {len(names)} columns ({', '.join(names)})"
                yield BadRow(place, "broken", reason, cells)
    except csv.Error as error:
        yield BadRow(f"{path}:{before + 1}", "broken", f"{error}; the rest of the file is not read", None)


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra, needed here only
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'entrenar[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error

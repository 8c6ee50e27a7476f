"""Rows of tables: csv, tsv and parquet."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entrenar.data.row import MAX_ROW_BYTES, TOO_LARGE, BadRow, Row, RowFaultError, RowStream, not_utf8, opened
from entrenar.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET_ROWS = 256
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def table_rows(path: Path, kind: str, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yield the rows of a csv or tsv file under the names of its first line, or under `columns`."""
    # The package's own limit of 131,072 letters a cell is less than a long document has.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with opened(path) as stream:
        table = _Table(path, stream, DELIMITERS[kind], columns)
        try:
            yield from table.rows()
        except csv.Error as error:
            is_open = "unexpected end of data" in str(error)
            reason = "a quotation mark opens in this row and is never closed" if is_open else str(error)
            yield _end(path, table.lines_done + 1, reason)
        except UnicodeDecodeError as error:
            yield _end(path, table.lines_read + 1, not_utf8(error))
        except RowFaultError as error:
            yield _end(path, max(table.lines_done, 1), str(error))


class _Table:
    """Cells of a csv or tsv file; `lines_done` counts those of the rows before the one that is read."""

    def __init__(self, path: Path, stream: RowStream, delimiter: str, columns: Sequence[str]) -> None:
        self._path, self._delimiter, self._columns = path, delimiter, list(columns)
        lines = _lines(stream)
        # A tab-separated file has no quoting: a sentence may begin with a quotation mark.
        self._reader = (
            csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            if delimiter == "\t"
            else csv.reader(lines, delimiter=delimiter, strict=True)
        )
        self.lines_done = 0

    @property
    def lines_read(self) -> int:
        return self._reader.line_num

    def rows(self) -> Iterator[Row | BadRow]:
        names = self._columns
        for cells in self._reader:
            place, self.lines_done = f"{self._path}:{self.lines_done + 1}", self._reader.line_num
            if not names:
                names = _checked_names(cells, self._delimiter) if cells else []
            elif self._columns and cells == self._columns:
                raise RowFaultError("the line repeats the names that columns gives; leave columns out")
            elif len(cells) == len(names):
                yield Row(place, dict(zip(names, cells, strict=True)))
            elif cells:
                reason = f"{len(cells)} cells where there are {len(names)} columns ({', '.join(names)})"
                yield BadRow(place, "broken", reason, cells)


def _end(path: Path, line: int, reason: str) -> BadRow:
    return BadRow(f"{path}:{line}", "broken", f"{reason}; the rest of the file is not read", None, ends_file=True)


def _lines(stream: RowStream) -> Iterator[str]:
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise RowFaultError(f"a line behind this row is larger than {MAX_ROW_BYTES:,} bytes")
        yield line.decode("utf-8")


def _checked_names(names: list[str], delimiter: str) -> list[str]:
    """Refuse names under which cells would be lost.

    Raises: RowFaultError.
    """
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise RowFaultError(f"two columns have the name {repeated!r}, so one of them would be lost; rename one")
    found = [word for letter, word in _OTHER_DELIMITERS.items() if letter != delimiter and letter in names[0]]
    if len(names) == 1 and found:
        raise RowFaultError(f"the first line has one column, {names[0]!r:.60}: the cells are separated by {found[0]}")
    return names


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | BadRow]:
    """Yield the rows of a parquet file, of `columns` alone if given.

    Raises: DataError if it is damaged or pyarrow is not installed.
    """
    with _parquet_file(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in _parquet_rows(batch):
                number += 1
                place = f"{path}:{number}"
                yield BadRow(place, "broken", TOO_LARGE, None) if row is None else Row(place, row)


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a batch; None for one that is too large, which becomes no Python object."""
    if batch.nbytes <= MAX_ROW_BYTES:
        yield from batch.to_pylist()
        return
    for index in range(batch.num_rows):
        one = batch.slice(index, 1)
        yield None if one.nbytes > MAX_ROW_BYTES else one.to_pylist()[0]


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises: as `parquet_rows`.
    """
    with _parquet_file(path) as table:
        return list(table.schema_arrow.names)


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra, needed here only
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'entrenar[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error

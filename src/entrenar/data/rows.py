"""Rows of data files, each with its place: the one reader of fine-tuning and of `prepare`.

    .jsonl .ndjson   a JSON object a line; a file that begins with [ is read as a list
    .json            a list of objects, an object around one list ({"data": […]}), or objects one after the other
    .csv .tsv        cells under the names of the first line, or under the names that the user gives
    .parquet         needs pyarrow
    … .gz            any of the text formats, compressed

A row that cannot be read is yielded as a `BadRow`, so that a check lists every fault of a file with its line.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from entrenar.data.json_rows import line_rows, value_rows
from entrenar.data.row import BadRow, Row, RowFaultError
from entrenar.data.table_rows import DELIMITERS, parquet_rows, table_rows
from entrenar.errors import DataError

_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", *DELIMITERS)


def format_of(path: Path) -> str:
    """Return the ending that names the format of a file of rows, without .gz; "" for any other file."""
    is_packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if is_packed else path).suffix.lower()
    return kind if kind in _FORMATS and not (is_packed and kind == ".parquet") else ""


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row | BadRow]:
    """Return the rows of a file; `columns` name those of a csv or tsv file whose first line is not their names.

    Raises: DataError for a file that is missing, of an unknown kind, or not readable at all.
    """
    kind = format_of(path)
    if not kind:
        raise DataError(f"{path} must be a .jsonl, .json, .parquet, .csv or .tsv file, or such a text as .gz")
    if columns and kind not in DELIMITERS:
        raise DataError(f"columns names those of csv and tsv files; {path} names its own")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file of rows")
    return _rows(path, kind, columns)


def _rows(path: Path, kind: str, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    try:
        if kind == ".parquet":
            yield from parquet_rows(path)
        elif kind in DELIMITERS:
            yield from table_rows(path, kind, columns)
        elif kind == ".json":
            yield from value_rows(path)
        else:
            yield from line_rows(path)
    except RowFaultError as fault:
        yield BadRow(f"{path}:1", "broken", str(fault), fault.content, ends_file=True)

"""A row of a data file with its place, and the opening of the files that hold rows.

Files are read a row at a time and a row has a limit in bytes, so memory follows from the longest row, not the file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import DataError

MAX_ROW_BYTES = 16 << 20
TOO_LARGE = f"the row is larger than {MAX_ROW_BYTES:,} bytes"
CONTENT_SHOWN = 1000
RowStream = io.BufferedReader | gzip.GzipFile
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """The fields of a row; `place` is file:line, and the row's number where it is not the first of its line."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, why, and its content; if it `ends_file`, the rows behind it were not read."""

    place: str
    kind: str
    reason: str
    content: Any
    ends_file: bool = False

    def __str__(self) -> str:
        """Write it as compilers write faults."""
        return f"{self.place}: {self.reason}"


class RowFaultError(Exception):
    """The reason why a row, or the rest of a file, cannot be read; `content` is its beginning."""

    def __init__(self, reason: str, content: Any = None) -> None:
        super().__init__(reason)
        self.content = content


def counted(number: int, name: str = "row") -> str:
    """Return a count with its noun: 1 row, 2,000 rows."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def row_of(place: str, value: Any) -> Row | BadRow:
    """Return a JSON value as a row."""
    if isinstance(value, dict):
        return Row(place, value)
    return BadRow(place, "broken", f"a row must be a JSON object, got {type(value).__name__}", value)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON.

    Raises: RowFaultError for a key that occurs twice, because one of its values would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFaultError(f"the key {twice!r} occurs twice, so one of its values would be lost")
    return found


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describe bytes that are not UTF-8."""
    return f"not UTF-8: byte {error.object[error.start]:#04x}; convert the file (iconv -f LATIN1 -t UTF-8)"


@contextmanager
def opened(path: Path) -> Iterator[RowStream]:
    """Open a file of rows, unpacked if it is .gz, behind its byte order mark.

    Raises: DataError for a file that cannot be read; RowFaultError for one in UTF-16 and for a damaged .gz.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            mark = _MARKS.get(stream.peek(2)[:2])
            if mark is not None:
                raise RowFaultError(f"not UTF-8 but {mark}; convert the file (iconv -f {mark} -t UTF-8)")
            if stream.peek(3)[:3] == _BYTE_ORDER_MARK:
                stream.read(3)
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowFaultError(f"the .gz is damaged: {error}; the rest of the file is not read") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error

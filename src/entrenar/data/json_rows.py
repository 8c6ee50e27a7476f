"""Rows of JSON: an object a line, a list of objects, or objects one after the other."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrenar.data.row import (
    CONTENT_SHOWN,
    MAX_ROW_BYTES,
    TOO_LARGE,
    BadRow,
    Row,
    RowFaultError,
    RowStream,
    not_utf8,
    opened,
    row_of,
    unique_keys,
)

_CHUNK_BYTES = 1 << 18
_LIST_IN_OBJECT = re.compile(r'\{\s*"(?:data|rows|train|examples|instances|items)"\s*:\s*(?=\[)')
_WHITE = re.compile(r"[ \t\r\n]*")


def line_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a file: one object per line, or one list of objects, which some .jsonl files hold."""
    with opened(path) as stream:
        yield from (_values if stream.peek(1).lstrip()[:1] == b"[" else _lines)(path, stream)


def value_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a file with a list of objects, an object around one list, or objects one after the other."""
    with opened(path) as stream:
        yield from _values(path, stream)


def _lines(path: Path, stream: RowStream) -> Iterator[Row | BadRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        place = f"{path}:{number}"
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            yield BadRow(place, "broken", TOO_LARGE, None)
        elif not line.isspace():
            yield _line(place, line)


def _line(place: str, line: bytes) -> Row | BadRow:
    try:
        return row_of(place, json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys))
    except UnicodeDecodeError as error:
        reason = not_utf8(error)
    except RowFaultError as error:
        reason = str(error)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
    return BadRow(place, "broken", reason, line.rstrip(b"\r\n")[:CONTENT_SHOWN].decode("utf-8", "replace"))


def _values(path: Path, stream: RowStream) -> Iterator[Row | BadRow]:
    text = _Text(stream)
    try:
        first = text.peek()
        if first == "[":
            yield from _list(path, text)
        elif first == "{" and text.take(_LIST_IN_OBJECT):
            yield from _list(path, text)
            text.expect("}", "the object around the list holds more than the list, which would be dropped")
        elif first == "{":
            yield from _objects(path, text)
        else:
            raise RowFaultError("the file must hold a JSON list of rows, or an object a line")
        if text.peek():
            raise RowFaultError("another value begins here, and would be dropped; make it one list (jq -s add FILE)")
    except RowFaultError as fault:
        reason = f"{fault}; the rest of the file is not read"
        yield BadRow(f"{path}:{text.line}", "broken", reason, text.shown(), ends_file=True)


def _list(path: Path, text: "_Text") -> Iterator[Row | BadRow]:
    """Read a list element by element, so that each has a place of its own and those before a fault are not lost."""
    text.expect("[", "a list must begin here")
    line_before, number = 0, 0
    while text.peek() != "]":
        number += 1
        place = f"{path}:{text.line}" if text.line != line_before else f"{path}:{text.line} (row {number})"
        line_before = text.line
        yield row_of(place, text.value())
        if text.peek() == "]":
            break
        text.expect(",", "not valid JSON: no comma or ] before this place")
    text.expect("]", "the list must end here")


def _objects(path: Path, text: "_Text") -> Iterator[Row | BadRow]:
    line_before, number = 0, 0
    while text.peek() == "{":
        number += 1
        place = f"{path}:{text.line}" if text.line != line_before else f"{path}:{text.line} (row {number})"
        line_before = text.line
        yield row_of(place, text.value())


class _Text:
    """The text of a stream, read as far as the next value needs it.

    Attributes:
        line: the line at which the last value, or the next letter, stands.
    """

    def __init__(self, stream: RowStream) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=unique_keys)
        self._text, self._at, self._is_whole = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """Return the next letter that is no white space, "" at the end."""
        while True:
            self._move(_WHITE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, letter: str, rule: str) -> None:
        """Move behind a letter.

        Raises: RowFaultError with the rule, if another stands there.
        """
        line = self.line
        if self.peek() != letter:
            self.line = line
            raise RowFaultError(rule)
        self._move(self._at + 1)

    def take(self, pattern: re.Pattern[str]) -> bool:
        """Move behind a pattern of at most a few words, if it is next."""
        while len(self._text) - self._at < CONTENT_SHOWN and self._more():
            pass
        match = pattern.match(self._text, self._at)
        if match:
            self._move(match.end())
        return match is not None

    def value(self) -> Any:
        """Return the next value.

        Raises: RowFaultError.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not self._more():
                    raise RowFaultError(f"not valid JSON: {getattr(error, 'msg', error)}") from error
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._move(end)
            return value

    def shown(self) -> str:
        """Return the beginning of what is not read yet."""
        return self._text[self._at : self._at + CONTENT_SHOWN]

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        """Read as much again as is waiting, so that a long value is parsed a few times only; false at the end."""
        waiting = len(self._text) - self._at
        if self._is_whole:
            return False
        if waiting > MAX_ROW_BYTES:
            raise RowFaultError(TOO_LARGE)
        data = self._stream.read(max(_CHUNK_BYTES, waiting))
        self._is_whole = not data
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.line += error.object.count(b"\n", 0, error.start) + self._text.count("\n", self._at)
            raise RowFaultError(not_utf8(error)) from error
        self._at = 0
        return bool(data)

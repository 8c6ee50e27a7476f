"""Find the files that a corpus is made of, and read documents out of them in constant memory.

A document is what belongs together: a text file, a part of one between separators, or a row of a jsonl, JSON, csv,
tsv or parquet file. Files are visited in sorted order, so a corpus depends on its content only. A file that the user
named must be readable. In a folder, links are followed, and whatever gives no document (binary, not UTF-8, too large,
empty, hidden, a row without text) is counted and named.
"""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from entrenar.data.corpus.settings import SourceConfig
from entrenar.data.row import BadRow, Row, RowFaultError
from entrenar.data.rows import format_of, read_rows
from entrenar.data.table_rows import parquet_columns, parquet_rows
from entrenar.errors import DataError

STDLIB = "stdlib"
_NEVER_READ = {"__pycache__", "node_modules"}
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_NAMES_KEPT = 20


@dataclass(frozen=True)
class SourceFile:
    """One file; `is_named` if the user named it, and did not only name a folder around it."""

    path: Path
    name: str
    size_bytes: int
    kind: str
    is_named: bool


@dataclass
class CorpusSource:
    """One source as the user named it, its files, and (reason, name) of what is left out of a folder."""

    name: str
    files: list[SourceFile]
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ReadLog:
    """A bounded summary of the files read: counts, the first names, and one digest over all files of a source."""

    skipped_counts: dict[str, int] = field(default_factory=dict)
    skipped_names: dict[str, list[str]] = field(default_factory=dict)
    cuts: int = 0
    documents: int = 0
    source_digest: Any = field(default_factory=hashlib.sha256)

    def begin_source(self) -> None:
        """Start the counts that belong to one source."""
        self.documents = 0
        self.source_digest = hashlib.sha256()

    def skip(self, reason: str, name: str) -> None:
        """Note that `name` was left out."""
        self.skipped_counts[reason] = self.skipped_counts.get(reason, 0) + 1
        names = self.skipped_names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)

    def skip_all(self, left_out: Iterable[tuple[str, str]]) -> Self:
        """Note each (reason, name)."""
        for reason, name in left_out:
            self.skip(reason, name)
        return self

    def add_file(self, name: str, digest: bytes) -> None:
        """Add a file's SHA-256 to its source's digest."""
        self.source_digest.update(f"{name}\0{digest.hex()}\n".encode())

    def skipped_summary(self) -> str:
        """Return "12 files binary (a.png, b.gif, …)" for each reason."""
        lines = []
        for reason, count in sorted(self.skipped_counts.items()):
            names = self.skipped_names[reason]
            more = ", …" if count > len(names) else ""
            lines.append(f"{count} {reason} ({', '.join(names)}{more})")
        return "; ".join(lines)


def find_sources(names: list[str], config: SourceConfig) -> list[CorpusSource]:
    """List the files of each source, sorted.

    Raises: DataError for a source that is missing or without files.
    """
    if not names:
        raise DataError(f"no source given: name files, folders, or {STDLIB!r}")
    return [_find_source(name, config) for name in names]


def _find_source(name: str, config: SourceConfig) -> CorpusSource:
    path = Path(name)
    if name == STDLIB and not path.exists():
        return _walk(name, Path(sysconfig.get_path("stdlib")), ("*.py",), _STDLIB_LEFT_OUT)
    if path.is_dir():
        source = _walk(name, path, config.include, _NEVER_READ)
        if not source.files:
            left_out = ReadLog().skip_all(source.left_out).skipped_summary()
            raise DataError(
                f"source {name} has no file that matches {', '.join(config.include)}"
                + (f"; left out: {left_out}" if left_out else "")
            )
        return source
    if path.is_file():
        return CorpusSource(name, [SourceFile(path, name, path.stat().st_size, _kind(path), is_named=True)])
    raise DataError(f"source {name} does not exist; give a file, a folder, or {STDLIB!r}")


def _kind(path: Path) -> str:
    return "rows" if format_of(path) else "text"


def _walk(name: str, root: Path, include: tuple[str, ...], never_read: set[str]) -> CorpusSource:
    """Find the files of a folder, through links too, each file and folder once."""
    source = CorpusSource(name, [])
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        place = Path(folder)
        subfolders[:] = sorted(sub for sub in subfolders if _enters(source, place / sub, root, never_read, seen))
        for file in sorted(names):
            path, relative = place / file, (place / file).relative_to(root).as_posix()
            reason = _why_left_out(path, include, seen)
            if reason:
                source.left_out.append((reason, relative))
            else:
                seen.add(os.path.realpath(path))
                source.files.append(SourceFile(path, relative, path.stat().st_size, _kind(path), is_named=False))
    source.files.sort(key=lambda file: file.name)
    return source


def _enters(source: CorpusSource, folder: Path, root: Path, never_read: set[str], seen: set[str]) -> bool:
    real, name = os.path.realpath(folder), folder.name
    reason = "hidden" if name.startswith(".") else "never read" if name in never_read else ""
    if not reason and real in seen:
        reason = "linked to what is read already"
    if reason:
        source.left_out.append((reason, f"{folder.relative_to(root).as_posix()}/"))
    seen.add(real)
    return not reason


def _why_left_out(path: Path, include: tuple[str, ...], seen: set[str]) -> str:
    if path.name.startswith("."):
        return "hidden"
    if not any(fnmatch.fnmatch(path.name, pattern) for pattern in include):
        return "not matched by include"
    if not path.is_file():
        return "broken links" if path.is_symlink() else "not regular files"
    return "linked to what is read already" if os.path.realpath(path) in seen else ""


def read_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    """Yield the documents of `file`, none empty and none longer than the configured bytes.

    Raises: DataError for a named file that cannot be read, naming file and place.
    """
    try:
        documents = (_text_documents if file.kind == "text" else _row_documents)(file, config, log)
        for document in documents:
            for part in _cut(document, config.max_document_bytes, log):
                log.documents += 1
                yield part
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error.strerror or error}") from error


def _cut(document: str, limit: int, log: ReadLog) -> Iterator[str]:
    """Cut `document` so that no part has more than `limit` bytes: at a line start, else between characters."""
    if len(document) * 4 <= limit or len(data := document.encode("utf-8")) <= limit:
        if document and not document.isspace():
            yield document
        return
    log.cuts += 1
    start = 0
    while start < len(data):
        rest = data[start : start + limit + 1]
        part = rest if len(rest) <= limit else rest[: _cut_point(rest, limit)]
        if not part.isspace():
            yield part.decode("utf-8")
        start += len(part)


def _cut_point(data: bytes, limit: int) -> int:
    """Return where to cut `data`, longer than `limit`: after the last newline up to there, else before a character."""
    line = data.rfind(b"\n", 0, limit) + 1
    if line:
        return line
    at = limit
    while data[at] & 0xC0 == 0x80 and at > limit - 4:
        at -= 1
    return at


def _text_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    digest = hashlib.sha256()
    if file.is_named:
        blocks = _blocks(file.path)
    elif file.size_bytes > config.max_file_bytes:
        log.skip("larger than max_file_bytes", file.name)
        return
    else:
        data = file.path.read_bytes()
        reason = _why_no_text(data)
        if reason:
            log.skip(reason, file.name)
            return
        blocks = iter([data])
    separator = (config.document_separator or "").encode("utf-8")
    pending, offset = b"", 0
    for block in blocks:
        digest.update(block)
        content = block
        if offset == 0 and not pending and block.startswith(_BYTE_ORDER_MARK):
            content, offset = block[len(_BYTE_ORDER_MARK) :], len(_BYTE_ORDER_MARK)
        parts = (pending + content).split(separator) if separator else [pending + content]
        pending = parts.pop()
        for part in parts:
            yield _decode(part, file, offset).strip("\r\n")
            offset += len(part) + len(separator)
        # Long documents leave in pieces, for constant memory; the tail may hold half a separator and stays.
        while len(pending) > config.max_document_bytes + len(separator):
            log.cuts += 1
            end = _cut_point(pending, config.max_document_bytes)
            yield _decode(pending[:end], file, offset)
            pending, offset = pending[end:], offset + end
    last = _decode(pending, file, offset)
    yield last.strip("\r\n") if separator else last
    log.add_file(file.name, digest.digest())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _why_no_text(data: bytes) -> str:
    """Return why the content of a file of a folder is no text, or ""."""
    if not data:
        return "empty"
    if b"\0" in data:
        return "binary"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _decode(data: bytes, file: SourceFile, offset: int) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{file.path} is binary, not text: a zero byte at offset {offset + zero}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}; "
            "convert it (iconv -f LATIN1 -t UTF-8)"
        ) from error


def _row_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    """Yield the text of each row; a row without one is an error in a named file, and is counted in a folder."""
    with file.path.open("rb") as stream:
        log.add_file(file.name, hashlib.file_digest(stream, "sha256").digest())
    for row in _rows(file, config):
        place = row.place
        try:
            if isinstance(row, BadRow):
                raise RowFaultError(row.reason)
            yield _row_text(row, config)
        except RowFaultError as fault:
            if file.is_named:
                raise DataError(f"{place}: {fault}") from fault
            is_rest = isinstance(row, BadRow) and row.ends_file
            reason = "rest of a file that cannot be read" if is_rest else f"rows without text in {config.text_field!r}"
            log.skip(reason, f"{file.name}:{place.rpartition(':')[2]}")


def _rows(file: SourceFile, config: SourceConfig) -> Iterator[Row | BadRow]:
    if format_of(file.path) != ".parquet":
        return read_rows(file.path)
    names = parquet_columns(file.path)
    if config.text_field not in names:
        reason = f"no column {config.text_field!r}; it has {', '.join(names)}"
        return iter([BadRow(str(file.path), "shape", reason, None, ends_file=True)])
    return parquet_rows(file.path, [config.text_field])


def _row_text(row: Row, config: SourceConfig) -> str:
    """Return the text of a row.

    Raises: RowFaultError.
    """
    name, fields = config.text_field, row.fields
    if name not in fields:
        raise RowFaultError(f"no field {name!r}; the row has {', '.join(sorted(map(str, fields))) or 'none'}")
    text = fields[name]
    if not isinstance(text, str):
        raise RowFaultError(f"field {name!r} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFaultError(f"field {name!r} holds a lone surrogate at position {error.start}") from error
    return text

"""Find the files that a corpus is made of, and read documents out of them in constant memory.

A document is what belongs together: a file, a part of a file between separators, or one row of a jsonl, JSON or
parquet file. Files are visited in sorted order, so a corpus depends only on content. A file that the user named must
be readable; inside a folder what is no text (binary, not UTF-8, too large, empty) is left out, counted and named.
"""

import fnmatch
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from entrenar.errors import DataError

STDLIB = "stdlib"
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_MAX_JSON_BYTES = 256 << 20
_MAX_LINE_BYTES = 64 << 20
_NAMES_KEPT = 20
_ROW_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}


class SourceConfig(BaseModel):
    """How documents are read out of sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    text_field: str = "text"
    """Field of a jsonl, JSON or parquet row that holds the document."""
    document_separator: str | None = None
    """Text between two documents of a text file, such as <|endoftext|>; without it a file is one document."""
    include: tuple[str, ...] = ("*",)
    """File names to take from a folder, as patterns (*.py)."""
    max_file_bytes: int = Field(default=4 << 20, gt=0)
    """Larger files of a folder are left out."""
    max_document_bytes: int = Field(default=1 << 20, ge=16)
    """Longer documents are cut at line starts into several."""


@dataclass(frozen=True)
class SourceFile:
    """One file; `is_named` if the user named it, and did not only name a folder around it."""

    path: Path
    name: str
    size_bytes: int
    kind: str
    is_named: bool


@dataclass
class Source:
    """One source as the user named it, and its files."""

    name: str
    files: list[SourceFile]


@dataclass
class ReadLog:
    """What reading came across, of bounded size: counts, the first names, and one digest over all files of a source."""

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

    def add_file(self, name: str, digest: bytes) -> None:
        """Take a file's SHA-256 into that of its source."""
        self.source_digest.update(f"{name}\0{digest.hex()}\n".encode())

    def skipped_summary(self) -> str:
        """Return "12 files binary (a.png, b.gif, …)" for each reason."""
        lines = []
        for reason, count in sorted(self.skipped_counts.items()):
            names = self.skipped_names[reason]
            more = ", …" if count > len(names) else ""
            lines.append(f"{count} {reason} ({', '.join(names)}{more})")
        return "; ".join(lines)


def find_sources(names: list[str], config: SourceConfig) -> list[Source]:
    """List the files of each source, sorted.

    Raises: DataError for a source that is missing or without files.
    """
    if not names:
        raise DataError(f"no source given: name files, folders, or {STDLIB!r}")
    return [_find_source(name, config) for name in names]


def _find_source(name: str, config: SourceConfig) -> Source:
    path = Path(name)
    if name == STDLIB and not path.exists():
        root = Path(sysconfig.get_path("stdlib"))
        files = _walk(root, ("*.py",), _STDLIB_LEFT_OUT)
    elif path.is_dir():
        files = _walk(path, config.include, {"__pycache__", "node_modules"})
    elif path.is_file():
        kind = _ROW_FORMATS.get(path.suffix.lower(), "text")
        return Source(name, [SourceFile(path, name, path.stat().st_size, kind, is_named=True)])
    else:
        raise DataError(f"source {name} does not exist; give a file, a folder, or {STDLIB!r}")
    if not files:
        raise DataError(f"source {name} has no file that matches {', '.join(config.include)}")
    return Source(name, files)


def _walk(root: Path, include: tuple[str, ...], left_out: set[str]) -> list[SourceFile]:
    found: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in include)
            if wanted and not name.startswith(".") and path.is_file() and not path.is_symlink():
                relative = path.relative_to(root).as_posix()
                found.append(SourceFile(path, relative, path.stat().st_size, "text", is_named=False))
    return sorted(found, key=lambda file: file.name)


def read_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    """Yield the documents of `file`, none empty and none longer than the configured bytes.

    Raises: DataError for a named file that cannot be read, naming file and place.
    """
    try:
        if file.kind == "text":
            documents = _text_documents(file, config, log)
        elif file.kind == "jsonl":
            documents = _jsonl_documents(file, config, log)
        elif file.kind == "json":
            documents = _json_documents(file, config, log)
        else:
            documents = _parquet_documents(file, config, log)
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


def _row_text(row: Any, config: SourceConfig, place: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
    if config.text_field not in row:
        raise DataError(
            f"{place}: no field {config.text_field!r}; the row has {', '.join(sorted(map(str, row))) or 'none'}"
        )
    text = row[config.text_field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {config.text_field!r} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {config.text_field!r} holds a lone surrogate at position {error.start}"
        ) from error
    return text


def _jsonl_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    digest = hashlib.sha256()
    with file.path.open("rb") as stream:
        number = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            digest.update(line)
            place = f"{file.path}:{number}"
            if len(line) == _MAX_LINE_BYTES:
                raise DataError(f"{place}: the line is longer than {_MAX_LINE_BYTES} bytes")
            if line.isspace():
                continue
            yield _row_text(_parse(line, place), config, place)
    log.add_file(file.name, digest.digest())


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error


def _json_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    if file.size_bytes > _MAX_JSON_BYTES:
        raise DataError(
            f"{file.path} has {file.size_bytes} bytes and must be read as a whole; "
            "write it as one object a line (jq -c '.[]' FILE > FILE.jsonl)"
        )
    data = file.path.read_bytes()
    log.add_file(file.name, hashlib.sha256(data).digest())
    rows = _parse(data, str(file.path))
    if not isinstance(rows, list):
        raise DataError(f"{file.path}: must be a list of objects, got {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield _row_text(row, config, f"{file.path}[{index}]")


def _parquet_documents(file: SourceFile, config: SourceConfig, log: ReadLog) -> Iterator[str]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra, needed here only
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{file.path}: reading parquet needs pyarrow; pip install 'entrenar[parquet]'") from error
    with file.path.open("rb") as stream:
        log.add_file(file.name, hashlib.file_digest(stream, "sha256").digest())
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if config.text_field not in names:
                raise DataError(f"{file.path}: no column {config.text_field!r}; it has {', '.join(names)}")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[config.text_field]):
                for text in batch.column(0).to_pylist():
                    yield _row_text({config.text_field: text}, config, f"{file.path}[{row}]")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is not a readable parquet file: {error}") from error

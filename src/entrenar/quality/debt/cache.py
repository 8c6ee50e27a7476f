"""Cache a file's measurements by its blob's hash, in the repository's own folder of objects.

A file's name decides what is public in it, so it is part of the key, and so are the versions of all that measures.
"""

import dataclasses
import hashlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.quality.debt.clones import Windows
from entrenar.quality.debt.functions import Class, Function
from entrenar.quality.debt.imports import Import
from entrenar.quality.debt.lint import Linted
from entrenar.quality.debt.measure import Measured, Unmeasured
from entrenar.quality.debt.sources import Entry

_LOG = logging.getLogger(__name__)
_FILE = "entrenar-debt.sqlite"
_SCHEMA = "create table if not exists measured (key text primary key, body blob not null)"
_SELECT = "select key, body from measured where key in (select value from json_each(?))"


class Cache:
    """Measured files. A cache that cannot be read or written costs time, never an error."""

    def __init__(self, folder: Path | None, scorer: Mapping[str, str]) -> None:
        self._versions = json.dumps(dict(scorer), sort_keys=True)
        self._connection: sqlite3.Connection | None = None
        if folder is not None:
            try:
                self._connection = sqlite3.connect(folder / _FILE)
                self._connection.execute(_SCHEMA)
            except sqlite3.Error as fault:
                self._give_up(fault)

    def load(self, entries: Iterable[Entry]) -> dict[Entry, Measured | Unmeasured]:
        """Return those of the files that are known."""
        if self._connection is None:
            return {}
        keys = {self._key(entry): entry for entry in entries}
        try:
            rows = self._connection.execute(_SELECT, (json.dumps(list(keys)),))
            return {keys[key]: _decoded(body) for key, body in rows}
        except (sqlite3.Error, zlib.error, ValueError, TypeError, KeyError) as fault:
            self._give_up(fault)
            return {}

    def store(self, found: Mapping[Entry, Measured | Unmeasured]) -> None:
        """Keep files."""
        if self._connection is None or not found:
            return
        rows = [(self._key(entry), _encoded(measured)) for entry, measured in found.items()]
        try:
            with self._connection:
                self._connection.executemany("insert or replace into measured values (?, ?)", rows)
        except sqlite3.Error as fault:
            self._give_up(fault)

    def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _key(self, entry: Entry) -> str:
        return hashlib.sha256(f"{entry.blob}\0{entry.name}\0{self._versions}".encode()).hexdigest()

    def _give_up(self, fault: Exception) -> None:
        _LOG.warning("the cache of scores cannot be used (%s); all files are measured again", fault)
        self.close()


def _encoded(found: Measured | Unmeasured) -> bytes:
    body: dict[str, Any] = {"unmeasured": dataclasses.astuple(found)} if isinstance(found, Unmeasured) else {
        "functions": [dataclasses.astuple(row) for row in found.functions],
        "classes": [dataclasses.astuple(row) for row in found.classes],
        "code_lines": found.code_lines,
        "cognitive": list(found.cognitive.items()),
        "imports": [dataclasses.astuple(row) for row in found.imports],
        "hashes": found.windows.hashes.tobytes().hex(),
        "lines": found.windows.lines.tobytes().hex(),
        "cyclomatic": list(found.linted.cyclomatic.items()),
        "findings": found.linted.findings,
    }  # fmt: skip
    return zlib.compress(json.dumps(body).encode(), level=1)


def _decoded(body: bytes) -> Measured | Unmeasured:
    table = json.loads(zlib.decompress(body))
    if "unmeasured" in table:
        return Unmeasured(*table["unmeasured"])
    hashes, lines = bytes.fromhex(table["hashes"]), bytes.fromhex(table["lines"])
    return Measured(
        functions=tuple(Function(*row) for row in table["functions"]),
        classes=tuple(Class(*row) for row in table["classes"]),
        code_lines=table["code_lines"],
        cognitive=dict(table["cognitive"]),
        imports=tuple(Import(line, module, tuple(names), *rest) for line, module, names, *rest in table["imports"]),
        windows=Windows(np.frombuffer(hashes, np.uint64), np.frombuffer(lines, np.uint32)),
        linted=Linted(dict(table["cyclomatic"]), tuple((rule, line, text) for rule, line, text in table["findings"])),
    )

"""From files of rows to examples, with every fault named by file and line.

One pass serves the check and the training: it returns the examples, the rows that cannot be used, and what a user
should know of the rest (rows left out or cut for their length, rows that stand twice). What becomes of the faults is
the user's choice: `accept` stops, or lets the good rows through and hands the bad ones back to be written down.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data.sft.encode import Encoder, Example
from entrenar.data.sft.rows import BadRow, Row, read_rows
from entrenar.data.sft.settings import SftConfig
from entrenar.data.sft.shapes import UnusableRowError, read_shape
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError
from entrenar.files import atomic_write

_FAULTS_SHOWN = 10


@dataclass
class SftRows:
    """What was found in files of rows.

    Attributes:
        examples: the rows that can be trained on, in order.
        bad: the rows that cannot.
        too_long: rows longer than seq_len, left out or cut.
        duplicates: places of rows whose tokens stood before, each with the first place.
        num_rows: all rows.
    """

    examples: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    too_long: list[BadRow] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    num_rows: int = 0

    def notes(self, config: SftConfig) -> Iterator[str]:
        """Say what became of the rows, a line for each thing that a user should know."""
        tokens = sum(example.num_inputs for example in self.examples)
        trained = sum(int(example.is_trained[1:].sum()) for example in self.examples)
        yield f"{len(self.examples):,} of {self.num_rows:,} rows, {tokens:,} tokens, {trained:,} of them trained"
        if self.too_long:
            deed = "cut" if config.long_rows == "cut" else "left out"
            places = ", ".join(row.place for row in self.too_long[:3])
            yield f"{len(self.too_long):,} rows longer than seq_len = {config.seq_len} {deed} ({places} …)"
        if self.duplicates:
            later, first = self.duplicates[0]
            yield f"{len(self.duplicates):,} rows stand twice ({later} is {first})"
        if self.bad:
            kinds = Counter(row.kind for row in self.bad)
            yield f"{len(self.bad):,} rows cannot be used: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"


def read_examples(files: Sequence[Path], tokenizer: Tokenizer, config: SftConfig) -> SftRows:
    """Read, recognize and encode every row of `files`; faults are collected, not raised.

    Raises: DataError for a file that cannot be read at all; ConfigError for a format the tokenizer does not have.
    """
    rows = SftRows()
    seen: dict[bytes, str] = {}
    templates = None
    if config.prompt_template is not None and config.completion_template is not None:
        templates = (config.prompt_template, config.completion_template)
    with Encoder(tokenizer, config.prompt_format, config.train_on) as encoder:
        for row in _rows_of(files, config):
            rows.num_rows += 1
            if isinstance(row, BadRow):
                rows.bad.append(row)
                continue
            try:
                example = encoder.encode(read_shape(row.fields, templates), row.place)
                _take(rows, example, row, config)
            except UnusableRowError as error:
                rows.bad.append(BadRow(row.place, error.kind, str(error), row.fields))
                continue
            first = seen.setdefault(hashlib.blake2b(example.ids.tobytes(), digest_size=16).digest(), row.place)
            if first != row.place:
                rows.duplicates.append((row.place, first))
    return rows


def _rows_of(files: Iterable[Path], config: SftConfig) -> Iterator[Row | BadRow]:
    for file in files:
        yield from read_rows(file, config.columns)


def _take(rows: SftRows, example: Example, row: Row, config: SftConfig) -> None:
    """Keep an example, within the length that is allowed."""
    if example.num_inputs <= config.seq_len:
        rows.examples.append(example)
        return
    reason = f"{len(example.ids)} tokens, seq_len = {config.seq_len} holds {config.seq_len + 1}"
    if config.long_rows == "stop":
        raise UnusableRowError("too_long", f"{reason}; raise seq_len, or set long_rows = drop or cut")
    rows.too_long.append(BadRow(row.place, "too_long", reason, row.fields))
    if config.long_rows == "cut":
        end = config.seq_len + 1
        if not example.is_trained[1:end].any():
            raise UnusableRowError("masked", f"{reason}; the cut leaves nothing of the answer")
        rows.examples.append(Example(example.place, example.ids[:end], example.is_trained[:end]))


def accept(rows: SftRows, config: SftConfig, quarantine: Path) -> list[Example]:
    """Return the examples if the user's choice lets them pass; bad rows are written to `quarantine`, if to anywhere.

    Raises: DataError that names the rows which cannot be used, or says that none can.
    """
    if rows.bad and config.bad_rows == "stop":
        shown = "\n  ".join(str(row) for row in rows.bad[:_FAULTS_SHOWN])
        more = f"\n  … and {len(rows.bad) - _FAULTS_SHOWN} more" if len(rows.bad) > _FAULTS_SHOWN else ""
        raise DataError(
            f"{len(rows.bad)} of {rows.num_rows} rows cannot be used:\n  {shown}{more}\n"
            "mend them, or set bad_rows = quarantine to train on the others"
        )
    if rows.bad:
        write_quarantine(rows.bad, quarantine)
    if not rows.examples:
        reasons = Counter(row.kind for row in [*rows.bad, *rows.too_long])
        found = ", ".join(f"{count} {kind}" for kind, count in reasons.items()) or "the files are empty"
        raise DataError(f"no row of {', '.join(map(str, config.data))} can be trained on: {found}")
    return rows.examples


def write_quarantine(bad: Sequence[BadRow], path: Path) -> None:
    """Write bad rows as jsonl: place, kind, reason, and the row itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(_record(row), ensure_ascii=True, default=str) + "\n" for row in bad))


def _record(row: BadRow) -> dict[str, Any]:
    return {"place": row.place, "kind": row.kind, "reason": row.reason, "row": row.content}


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples; equal ones fall on the same side, and order does not matter.

    Raises: DataError if one side would be empty.
    """
    if fraction == 0.0:
        return list(examples), []
    key = seed.to_bytes(8, "little", signed=True)
    draws = [hashlib.blake2b(example.ids.tobytes(), digest_size=8, key=key).digest() for example in examples]
    limit = sorted(draws)[max(1, round(fraction * len(draws))) - 1]
    held_out = [example for example, draw in zip(examples, draws, strict=True) if draw <= limit]
    train = [example for example, draw in zip(examples, draws, strict=True) if draw > limit]
    if not train:
        raise DataError(
            f"holding out {fraction:g} of {len(examples)} rows leaves none to train on; "
            "give more rows, eval_data, or eval_fraction = 0"
        )
    return train, held_out


def total_tokens(examples: Sequence[Example]) -> int:
    """Return how many tokens the model reads in one pass over the examples."""
    return int(np.sum([example.num_inputs for example in examples], dtype=np.int64))

"""From files of rows to examples, with every fault named by file and line.

One pass serves the check and the training. It returns the examples, the rows that cannot be used, and what a user
should know about the others: rows that are left out or cut for their length, rows that say they are not to be
trained, duplicate rows, fields that nothing reads. The user chooses what happens to faulty rows: `accept` stops, or
lets the good rows through and writes the faulty ones down.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data.row import BadRow, Row, counted
from entrenar.data.rows import format_of, read_rows
from entrenar.data.sft.encode import Encoder, Example
from entrenar.data.sft.prompt_template import PromptTemplate
from entrenar.data.sft.settings import SftConfig
from entrenar.data.sft.shapes import RejectedRowError, read_shape
from entrenar.data.sft.turns import Conversation, UnusableRowError
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError
from entrenar.files import atomic_write

_FAULTS_SHOWN = 10
# Keys that only link messages to each other: a template that does not read them loses nothing of what is said.
_LINKS = frozenset({"name", "tool_call_id"})
_VALUES = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")


@dataclass
class SftRows:
    """The rows found in files, sorted by their use.

    Attributes:
        examples: the rows that can be trained on, in order.
        bad: the rows that cannot.
        too_long: rows longer than seq_len, left out or cut.
        not_trained: rows that mark themselves as not to be trained.
        duplicates: places of rows whose tokens were read before, each with the first place.
        unread: fields that the templates do not read, and in how many rows.
        control: places of rows that spell control tokens as text, each with the first such token.
        num_rows: all rows.
        files: the files that were read.
    """

    examples: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    too_long: list[BadRow] = field(default_factory=list)
    not_trained: list[BadRow] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    control: list[tuple[str, str]] = field(default_factory=list)
    num_rows: int = 0
    files: tuple[Path, ...] = ()

    def notes(self, config: SftConfig) -> Iterator[str]:
        """Describe the rows, a line for each thing that a user should know."""
        tokens = sum(example.num_inputs for example in self.examples)
        trained = sum(int(example.is_trained[1:].sum()) for example in self.examples)
        yield f"{len(self.examples):,} of {counted(self.num_rows)}, {tokens:,} tokens, {trained:,} of them trained"
        if self.too_long:
            deed = "cut" if config.long_rows == "cut" else "left out"
            places = ", ".join(row.place for row in self.too_long[:3])
            yield f"{counted(len(self.too_long))} longer than seq_len = {config.seq_len} {deed} ({places} …)"
        if self.not_trained:
            first_row = self.not_trained[0]
            yield f"{counted(len(self.not_trained))} left out: {first_row.reason} ({first_row.place} …)"
        if self.duplicates:
            later, first = self.duplicates[0]
            yield f"{counted(len(self.duplicates), 'duplicate row')} ({later} is {first})"
        if self.unread:
            fields = ", ".join(f"{name} ({counted(count)})" for name, count in self.unread.most_common())
            yield f"fields that the templates do not read: {fields}"
        if self.control:
            place, name = self.control[0]
            spell = "spells" if len(self.control) == 1 else "spell"
            yield (
                f"{counted(len(self.control))} {spell} control tokens, which are read as plain text ({name} in "
                f"{place}); give such rows as messages, so that the chat template writes the tokens"
            )
        if self.bad:
            kinds = Counter(row.kind for row in self.bad)
            yield f"{counted(len(self.bad))} cannot be used: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"


def read_examples(files: Sequence[Path], tokenizer: Tokenizer, config: SftConfig) -> SftRows:
    """Read, recognize and encode every row of `files`; faults are collected, not raised.

    Raises: DataError for a file that cannot be read at all; ConfigError for a format the tokenizer does not have.
    """
    rows = SftRows(files=tuple(files))
    seen: dict[bytes, str] = {}
    reader = _Reader(tokenizer, config, rows)
    with reader.encoder:
        for row in _rows_of(files, config):
            rows.num_rows += 1
            if isinstance(row, BadRow):
                rows.bad.append(row)
                continue
            try:
                example = reader.read(row)
                _take(rows, example, row, config)
            except RejectedRowError as reason:
                rows.not_trained.append(BadRow(row.place, "not_trained", str(reason), row.fields))
                continue
            except UnusableRowError as error:
                rows.bad.append(BadRow(row.place, error.kind, f"{error}{_hint(row, error, config)}", row.fields))
                continue
            except RecursionError:
                rows.bad.append(BadRow(row.place, "broken", "its lists and objects are nested too deeply", None))
                continue
            first = seen.setdefault(hashlib.blake2b(example.ids.tobytes(), digest_size=16).digest(), row.place)
            if first != row.place:
                rows.duplicates.append((row.place, first))
    return rows


class _Reader:
    """Turns rows into examples, and notes what nothing reads."""

    def __init__(self, tokenizer: Tokenizer, config: SftConfig, rows: SftRows) -> None:
        self.encoder = Encoder(tokenizer, config.prompt_format, config.train_on, config.template_date)
        self._ignored, self._notes = config.ignore_fields, rows
        self._templates = None
        if config.prompt_template is not None and config.completion_template is not None:
            self._templates = PromptTemplate(config.prompt_template), PromptTemplate(config.completion_template)
        names = [tokenizer.name_of(index) for index in sorted(tokenizer.special_ids)]
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def read(self, row: Row) -> Example:
        """Return a row's tokens and marks.

        Raises: UnusableRowError, RejectedRowError.
        """
        conversation = read_shape(row.fields, self._templates, self._ignored)
        self._note_unread(row, conversation)
        example = self.encoder.encode(conversation, row.place)
        spelled = next((match for turn in conversation.turns if (match := self._control.search(turn.content))), None)
        if spelled is not None:
            self._notes.control.append((row.place, spelled[0]))
        return example

    def _note_unread(self, row: Row, conversation: Conversation) -> None:
        """Refuse what a template would drop of what is said; count what it does not need."""
        if self._templates is not None:
            used = {name for template in self._templates for name in template.top_fields(row.fields)}
            self._notes.unread.update(set(row.fields) - used - set(self._ignored))
        unread = conversation.unread_by(self.encoder.template_of(conversation))
        dropped = sorted(unread - _LINKS)
        if dropped:
            raise UnusableRowError(
                "field",
                f"{dropped[0]} is not read by the chat template, so training would drop it; use a tokenizer whose "
                f"template reads it, or name it in ignore_fields (--ignore-fields {','.join(dropped)})",
            )
        self._notes.unread.update(unread)


def _hint(row: Row, error: UnusableRowError, config: SftConfig) -> str:
    """Describe where a table's names come from if its rows have no known shape."""
    is_table = format_of(Path(row.place.rpartition(":")[0])) in (".csv", ".tsv")
    if not is_table or error.kind != "shape" or config.columns:
        return ""
    return "; the first line of a table names its columns: if it is a row, give their names as columns (--columns)"


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
        rows.examples.append(replace(example, ids=example.ids[:end], is_trained=example.is_trained[:end]))


def grouped(bad: Sequence[BadRow], *, has_kind: bool = False) -> list[str]:
    """Describe rows, one line for each fault: equal ones differ in numbers and quoted values alone."""
    groups: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        groups.setdefault((row.kind, _VALUES.sub("", row.reason)), []).append(row)
    return [
        (f"{rows[0].place}: {rows[0].kind}: {rows[0].reason}" if has_kind else str(rows[0]))
        + (f" (and {len(rows) - 1:,} more, the last at {rows[-1].place})" if len(rows) > 1 else "")
        for rows in groups.values()
    ]


def accept(rows: SftRows, config: SftConfig, quarantine: Path) -> list[Example]:
    """Return the examples if the user's choice lets them pass; write faulty rows to `quarantine`.

    A fault after which the rest of a file is not read always stops: the rows behind it would be lost unseen.

    Raises: DataError that names the rows which cannot be used, or says that none can.
    """
    of_files = [row for row in rows.bad if row.ends_file]
    if rows.bad and (config.bad_rows == "stop" or of_files):
        lines = grouped(of_files if config.bad_rows == "quarantine" else rows.bad)
        shown = "\n  ".join(lines[:_FAULTS_SHOWN])
        more = f"\n  … and {len(lines) - _FAULTS_SHOWN} more faults" if len(lines) > _FAULTS_SHOWN else ""
        remedy = (
            "repair the file: quarantine holds rows, and the rest of this file was not read"
            if of_files
            else "fix them, or set bad_rows = quarantine to train on the others"
        )
        raise DataError(f"{len(rows.bad)} of {rows.num_rows} rows cannot be used:\n  {shown}{more}\n{remedy}")
    if rows.bad:
        write_quarantine(rows.bad, quarantine)
    if not rows.examples:
        reasons = Counter(row.kind for row in [*rows.bad, *rows.too_long, *rows.not_trained])
        found = ", ".join(f"{count} {kind}" for kind, count in reasons.items()) or "the files are empty"
        raise DataError(f"no row of {', '.join(map(str, rows.files))} can be used: {found}")
    return rows.examples


def write_quarantine(bad: Sequence[BadRow], path: Path) -> None:
    """Write faulty rows as JSON lines: place, kind, reason, and the row itself."""
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

"""`entrenar data show|check FILE`: see what a fine-tuning run would train on, before it does."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from entrenar import data, interop, recipe
from entrenar.cli import flags
from entrenar.config import options
from entrenar.data import SftConfig
from entrenar.errors import ConfigError, DataError

if TYPE_CHECKING:
    from entrenar.data import Example, SftRows, Tokenizer

_TRAINED_STYLE = "bold green"
_USED = (
    "columns", "ignore_fields", "prompt_template", "completion_template", "prompt_format", "train_on", "long_rows",
    "seq_len",
)  # fmt: skip
_LISTS = ("columns", "ignore_fields")
_DUPLICATES_SHOWN = 20


def run(words: Sequence[str]) -> int:
    """Show or check; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    tokenizer, context = _tokenizer(parsed.model)
    config = _config(parsed, context)
    rows = data.read_examples(config.data, tokenizer, config)
    if parsed.action == "show":
        return _show(rows, tokenizer, config, parsed.rows)
    return _check(rows, config, parsed.quarantine)


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("data", "Look at fine-tuning data as the model will see it.")
    actions = arguments.add_subparsers(dest="action", required=True, metavar="show|check")
    show = actions.add_parser("show", help="print rows, their trained tokens in color, or between « and » in a file")
    show.add_argument("--rows", type=int, default=3, help="number of rows (default: 3)")
    check = actions.add_parser("check", help="name every fault by file and line; exit code 2 if there is one")
    check.add_argument("--quarantine", type=Path, metavar="FILE", help="write the faulty rows here")
    for action in (show, check):
        action.add_argument("file", type=Path, nargs="+", help="jsonl, json, parquet, csv or tsv; also as .gz")
        action.add_argument("--model", type=Path, required=True, help="model folder, run or tokenizer to encode with")
        for option in options(SftConfig):
            if option.key in _USED:
                metavar, text = option.path[-1].upper(), option.field.description
                default = "" if option.field.default in (None, ()) else f" (default: {option.field.default})"
                action.add_argument(
                    option.flag, dest=option.key, default=argparse.SUPPRESS, metavar=metavar, help=f"{text}{default}"
                )
    return arguments


def _config(parsed: argparse.Namespace, context: int | None) -> SftConfig:
    given = {key: value for key, value in vars(parsed).items() if key in _USED}
    if context is not None and "seq_len" not in given:
        given["seq_len"] = min(context, SftConfig.model_fields["seq_len"].default)
    given |= {key: given[key].split(",") for key in _LISTS if key in given}
    try:
        return SftConfig.model_validate({**given, "data": parsed.file})
    except ValidationError as error:
        faults = (f"--{'-'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg']}" for fault in error.errors())
        raise ConfigError("\n".join(faults)) from error


def _tokenizer(path: Path) -> "tuple[Tokenizer, int | None]":
    """Return a tokenizer and, if a model comes with it, the model's context: training keeps rows to that length."""
    if not (path / "config.json").is_file():
        try:
            return data.Tokenizer.load(path), None
        except DataError:
            path = recipe.model_folder(path)
    return data.Tokenizer.load(path), interop.read_config(path).context_length


def _show(rows: "SftRows", tokenizer: "Tokenizer", config: SftConfig, count: int) -> int:
    console = Console(highlight=False, soft_wrap=True)
    for example in rows.examples[:count]:
        trained = int(example.is_trained.sum())
        title = Text(f"{example.place}   {len(example.ids)} tokens, {trained} trained")  # not markup: "[" is a bracket
        console.rule(title, align="left")
        console.print(_marked(example, tokenizer, is_colored=console.is_terminal))
    for left_out in [*rows.not_trained[:count], *rows.too_long[:count]]:
        console.print(Text(f"left out: {left_out}"))
    for fault in data.grouped(rows.bad)[:count]:
        console.print(Text(fault, style="red"))
    for note in rows.notes(config):
        console.print(Text(note))
    return 0


def _marked(example: "Example", tokenizer: "Tokenizer", *, is_colored: bool) -> Text:
    """Return the text, its trained parts in color, or between marks where there is no color."""
    text = Text()
    for piece, is_trained in _pieces(example, tokenizer):
        if is_trained and not is_colored:
            text.append(f"«{piece}»")
        else:
            text.append(piece, style=_TRAINED_STYLE if is_trained else "")
    return text


def _pieces(example: "Example", tokenizer: "Tokenizer") -> Iterator[tuple[str, bool]]:
    stream = tokenizer.decode_stream(skip_special=False)
    start = 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.is_trained[end] != example.is_trained[start]:
            text = stream.feed(example.ids[start:end].tolist())
            yield text + (stream.finish() if end == len(example.ids) else ""), bool(example.is_trained[start])
            start = end


def _check(rows: "SftRows", config: SftConfig, quarantine: Path | None) -> int:
    for line in data.grouped([*rows.bad, *rows.too_long, *rows.not_trained], has_kind=True):
        print(line)
    for later, first in rows.duplicates[:_DUPLICATES_SHOWN]:
        print(f"{later}: duplicate: the same tokens as {first}")
    if len(rows.duplicates) > _DUPLICATES_SHOWN:
        print(f"… and {len(rows.duplicates) - _DUPLICATES_SHOWN:,} more duplicates")
    for note in rows.notes(config):
        print(note)
    if quarantine is not None and rows.bad:
        data.write_quarantine(rows.bad, quarantine)
        print(f"the faulty rows are in {quarantine}")
    if not rows.examples:
        print("no row can be trained on")
    return 0 if rows.examples and not rows.bad else 2

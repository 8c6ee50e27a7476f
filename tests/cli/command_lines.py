"""Command lines as nobody should write them: each flag of each command with values of every wrong kind."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch

from entrenar.cli.main import main

WRONG_VALUES = (
    "", "-1", "0", "99999999999999999999", "1e308", "-1e308", "1e-320", "nan", "inf", "true", "null", "{", "[1,", "[]",
    "ß🙂", "\udcff", "[/red]", "[bold", "/proc/nope", "/dev/null", "..", "n" * 300, "a,b", "%s", "--",
)  # fmt: skip
CODES = {0, 1, 2, 3, 5}


def flags_of(command: Sequence[str]) -> list[str]:
    """Return every flag that the help of a command names, the whole help where `--help` is a part of it."""
    shown = _help(command, "--help")
    if "--help-all" in shown:
        shown = _help(command, "--help-all")
    return sorted(set(re.findall(r"^ +(--[a-z][a-z0-9-]+)", shown, re.MULTILINE)) - {"--help", "--help-all"})


def _help(command: Sequence[str], flag: str) -> str:
    said = StringIO()
    with redirect_stdout(said):
        assert main([*command, flag]) == 0
    return said.getvalue()


def command_lines(commands: Mapping[tuple[str, ...], Sequence[str]]) -> Iterator[list[str]]:
    """Yield each flag of each command with each wrong value and with none; `commands` maps a command to its words."""
    for command, words in commands.items():
        for flag in flags_of(command):
            yield [*command, *words, flag]
            yield from ([*command, *words, f"{flag}={value}"] for value in WRONG_VALUES)


def ending(words: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command in `folder`; return its exit code and what it said on standard error."""
    here, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
            return main(words), said.getvalue()
    finally:
        os.chdir(here)
        with suppress(RuntimeError):
            torch.set_num_threads(threads)

"""`entrenar quality prompt NAME`: print a workflow prompt filled with measurements of the repository."""

import argparse
from collections.abc import Sequence

from entrenar.errors import ConfigError
from entrenar.quality.debt.report import dumps
from entrenar.quality.prompts.library import fill, library


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which prompt")
    parser.add_argument("--list", action="store_true", help="print the names, what each is for, and its variables")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a variable; repeatable")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.set_defaults(check=_prompt)


def _prompt(parsed: argparse.Namespace) -> int:
    known = library(parsed.project)
    if parsed.list == (parsed.name is not None):
        raise ConfigError("give the name of a prompt, or --list")
    if parsed.list:
        for prompt in known.values():
            variables = [key if value is None else f"{key}={value}" for key, value in prompt.variables.items()]
            print(f"{prompt.name:<26} {prompt.title}" + (f"  ({', '.join(variables)})" if variables else ""))
        return 0
    if parsed.name not in known:
        raise ConfigError(f"no prompt {parsed.name!r}; there are {', '.join(known)}")
    text = fill(known[parsed.name], _given(parsed.set), parsed.project)
    print(text if parsed.format == "text" else dumps({"name": parsed.name, "text": text}))
    return 0


def _given(words: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        key, is_set, value = word.partition("=")
        if not is_set or key in given:
            raise ConfigError(f"--set needs KEY=VALUE, each key once; got {word!r}")
        given[key] = value
    return given

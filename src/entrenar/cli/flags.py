"""Turn every option of a run into a flag, described by the docstring of its field.

The config models load torch, so the functions that need them import them: a command without such flags answers
`--help` and usage errors at once.
"""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_origin

from entrenar.errors import ConfigError
from entrenar.synonyms import elsewhere

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    from entrenar.config import RunConfig

# What a first run needs: one screen. The others are shown by --help-all.
_ESSENTIAL = {
    "name", "preset", "model", "method", "device", "data.corpus", "data.batch_size", "data.seq_len", "sft.data",
    "sft.batch_size", "sft.seq_len", "lora.rank", "lora.layers", "train.max_steps", "train.epochs", "train.max_time_s",
    "train.precision", "train.threads", "optim.lr", "checkpoint.save_every",
}  # fmt: skip
_LARGEST, _MOST_DIGITS, _MOST_THREADS = 2**31 - 1, 20, 1024
ModelT = TypeVar("ModelT", bound="BaseModel")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return an argument parser in this program's style."""
    return argparse.ArgumentParser(
        prog=f"entrenar {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a script that passes --max must not change its meaning when --max-memory is added
    )


def add_run_flags(arguments: argparse.ArgumentParser) -> None:
    """Add the flags that say how a run begins: new, resumed or replaced, and planned first."""
    for flag, text in (
        ("--resume", "continue from the latest intact checkpoint of the run"),
        ("--resume-if-any", "continue the run if it has a checkpoint, else begin it: for what restarts by itself"),
        ("--overwrite", "delete an earlier run of the same name first"),
        ("--allow-config-changes", "resume although the config has changed since the run began"),
        ("--plan", "plan first, and compare the peak with the plan at the end"),
    ):
        arguments.add_argument(flag, action="store_true", help=text)
    arguments.add_argument(
        "--quality-gate", type=Path, metavar="BASELINE", help="stop if the code scores 5 points less than this baseline"
    )


def add_config_flags(arguments: argparse.ArgumentParser, model: "type[BaseModel] | None" = None) -> None:
    """Add `--config FILE` and one flag for each option of `model` (a run's), grouped by the tables of the file."""
    from entrenar.config import RunConfig, options  # noqa: PLC0415  # loads torch

    arguments.usage = f"{arguments.prog} [--config FILE] [flags]"
    arguments.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option of a run")
    arguments.add_argument("--config", type=Path, metavar="FILE", help="TOML or JSON file; flags override it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    hidden = 0
    for option in options(model or RunConfig):
        table = option.path[0] if len(option.path) > 1 else "run"
        group = groups.setdefault(table, arguments.add_argument_group(f"[{table}]" if table != "run" else "run"))
        default = option.field.get_default(call_default_factory=True)
        shown = "" if default is None or option.field.is_required() else f" (default: {_shown(default)})"
        has_value = option.field.annotation is not bool
        text = (option.field.description or "").replace("%", "%%") + shown
        is_hidden = option.key not in _ESSENTIAL
        hidden += is_hidden
        action = group.add_argument(
            option.flag,
            dest=option.key,
            metavar=_metavar(option.path[-1], option.field.annotation),
            nargs=None if has_value else "?",
            const=None if has_value else "true",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if is_hidden else text,
        )
        vars(action)["full_help"] = text
    arguments.epilog = (
        f"{hidden} more options: {arguments.prog} --help-all. Any of them can stand in a config file: "
        "entrenar config print shows one."
    )


class _HelpAll(argparse.Action):
    """Print the help with every option and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Put back what `--help` leaves out."""
        for action in parser._actions:
            action.help = vars(action).get("full_help", action.help)
        parser.epilog = None
        parser.print_help()
        parser.exit()


def _metavar(name: str, annotation: object) -> str:
    """Return the placeholder for a flag's value: its choices if they are a few words, else its name."""
    if annotation is bool:
        return "true|false"
    kinds = [annotation] if get_origin(annotation) is Literal else list(get_args(annotation))
    is_closed = all(get_origin(kind) is Literal or kind in (NoneType, Ellipsis) for kind in kinds)
    words = [str(word) for kind in kinds for word in get_args(kind)] if is_closed else []
    return ("," if get_origin(annotation) is tuple else "|").join(words) or name.upper()


def _shown(default: object) -> str:
    return " ".join(str(item) for item in default) if isinstance(default, tuple) else str(default)


def given_flags(parsed: argparse.Namespace, model: "type[BaseModel] | None" = None) -> dict[str, str]:
    """Return the config flags that were given, by dotted key."""
    from entrenar.config import RunConfig, options  # noqa: PLC0415  # loads torch

    keys = {option.key for option in options(model or RunConfig)}
    return {key: value for key, value in vars(parsed).items() if key in keys}


def config_of(parsed: argparse.Namespace) -> "RunConfig":
    """Read the config file and apply the given flags over it.

    Raises: ConfigError with every fault.
    """
    from entrenar.config_file import load_config  # noqa: PLC0415  # loads torch

    return load_config(parsed.config, given_flags(parsed))


def positive(text: str) -> int:
    """Parse a flag's value as a whole number >= 1."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:_MOST_DIGITS]) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def thread_count(text: str) -> int:
    """Parse a flag's value as a number of threads."""
    if positive(text) > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_THREADS}, got {text!r}")
    return int(text)


def parse(arguments: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse; argparse itself exits with 2 on a fault and 0 after --help.

    Raises:
        ConfigError: flags that do not exist, each with the nearest one.
    """
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # argparse would read it as an empty list
            raise ConfigError(f"{word[:-3]} needs a value, got '--'")
    parsed, unknown = arguments.parse_known_args(list(words))
    if unknown:
        flags = [word for word in unknown if word.startswith("-")] or unknown
        raise ConfigError(
            "\n".join(f"{flag} is not a flag of {arguments.prog}{_nearest(flag, arguments)}" for flag in flags)
        )
    return parsed


def flags_of(arguments: argparse.ArgumentParser) -> Iterator[str]:
    """Yield every flag of a parser and of its subcommands."""
    for action in arguments._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags_of(inner)


def _nearest(flag: str, arguments: argparse.ArgumentParser) -> str:
    known = [word for word in flags_of(arguments) if word.startswith("--")]
    given = flag.partition("=")[0]
    names = [word[2:].replace("-", "_") for word in known]
    if (ours := elsewhere(given.lstrip("-").replace("-", "_"), names)) is not None:
        return f"; did you mean {' '.join(['--' + ours[0].replace('_', '-'), *ours[1:]])}?"
    match = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {match[0]}?" if match else f"; `{arguments.prog} --help` lists them all"


def add_field_flags(
    arguments: argparse.ArgumentParser, model: "type[BaseModel]", leave_out: Sequence[str] = ()
) -> None:
    """Add a flag for each field of one config model; a field with several values takes several words."""
    for name, field in model.model_fields.items():
        if name not in leave_out:
            arguments.add_argument(
                "--" + name.replace("_", "-"),
                dest=f"config.{name}",
                nargs="+" if isinstance(field.default, tuple) else None,
                metavar=_metavar(name, field.annotation),
                default=argparse.SUPPRESS,
                help=f"{(field.description or '').replace('%', '%%')} (default: {field.default})",
            )


def _reason(fault: "ErrorDetails") -> str:
    own = fault.get("ctx", {}).get("error")
    return str(own) if own is not None else f"{fault['msg']}, got {fault['input']!r:.100}"


def from_fields(parsed: argparse.Namespace, model: type[ModelT]) -> ModelT:
    """Build the config model from the flags of `add_field_flags`.

    Raises: ConfigError with every fault.
    """
    from pydantic import ValidationError  # noqa: PLC0415  # the model has loaded it

    given = {name: getattr(parsed, f"config.{name}") for name in model.model_fields if f"config.{name}" in parsed}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        faults = [
            "".join(f"--{str(part).replace('_', '-')}: " for part in fault["loc"][:1]) + _reason(fault)
            for fault in error.errors()
        ]
        raise ConfigError("\n".join(faults)) from error

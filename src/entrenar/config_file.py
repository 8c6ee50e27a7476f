"""Reads a run's settings from a TOML or JSON file and from flags, and writes them.

Flags go over the file. All faults are reported at once, each with its rule, value, file and line, and the nearest
setting where a name is wrong.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from entrenar.config import AnyConfig, ConfigT, FinetuneConfig, Option, RunConfig, idle_options, no_effect, options
from entrenar.errors import ConfigError
from entrenar.model import LlamaConfig, PresetName
from entrenar.synonyms import elsewhere

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """Settings over those of a file, by dotted key: the texts of flags, or a Python caller's arguments."""

    values: Mapping[str, Any]
    are_arguments: bool = False

    def read(self, key: str, *, is_list: bool) -> Any:
        """Return the value of a setting; an argument is one already, and a single item is a list of one."""
        value = self.values[key]
        if not self.are_arguments:
            return _parse_flag(value, is_list=is_list)
        return [value] if is_list and isinstance(value, str | Path) else value

    def place(self, key: str) -> str:
        """Return where the setting was given."""
        name = key.rpartition(".")[2]
        return f"argument {name}" if self.are_arguments else f"flag --{name.replace('_', '-')}"

    def request(self, key: str) -> str:
        """Return how to give the setting."""
        name = key.rpartition(".")[2]
        return f"pass {name}=…" if self.are_arguments else f"give --{name.replace('_', '-')}"

    def texts(self, known: Sequence[Option]) -> dict[str, str]:
        """Return a fault by key for each argument that is text in place of a number, which pydantic would accept."""
        found = {}
        for option in known if self.are_arguments else ():
            value, kinds = self.values.get(option.key), _kinds(option.field.annotation)
            if isinstance(value, str) and not _takes_text(kinds):
                rule = f"must be {_KINDS.get(kinds[0], 'a table')}, got the text {value!r}"
                found[option.key] = f"{option.key}: {rule} ({self.place(option.key)})"
        return found


_KINDS: Mapping[Any, str] = {bool: "True or False", int: "a whole number", float: "a number"}


def load_config(file: Path | None, flags: Mapping[str, Any] | None = None, *, are_arguments: bool = False) -> RunConfig:
    """Read `file` (TOML or JSON), apply the flags (dotted key to text) over it, and validate the result.

    `flags` hold a Python caller's values instead if they `are_arguments`.

    Raises:
        ConfigError: every fault in file and flags, in one message.
    """
    return _load(RunConfig, file, Given(flags or {}, are_arguments), _with_preset, default_epochs=1)


def load_finetune_config(
    file: Path | None, flags: Mapping[str, Any] | None = None, *, are_arguments: bool = False
) -> FinetuneConfig:
    """Read the config of a fine-tuning run; see `load_config`."""
    return _load(FinetuneConfig, file, Given(flags or {}, are_arguments), _with_own_defaults, default_epochs=3)


def _load(
    model: type[ConfigT],
    file: Path | None,
    given: Given,
    expand: Callable[[dict[str, Any], Mapping[str, Any]], None],
    *,
    default_epochs: int,
) -> ConfigT:
    source, known = ConfigFile.read(file), list(options(model))
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in source.values.items()}
    expand(values, given.values)
    _settle_length(values, given.values, default_epochs)
    lists = {option.key for option in known if _is_list(option.field.annotation)}
    for key in given.values:
        _set(values, key.split("."), given.read(key, is_list=key in lists))
    for option in known:
        _keep_truth_from_numbers(values, option)
    config = _validated(model, values, source, given)
    if idle := [no_effect(key, remedy) for key, remedy in idle_options(config).items() if key in given.values]:
        raise ConfigError("\n".join(idle))
    return config


def arguments_of(model: type[ModelT], values: Mapping[str, Any]) -> ModelT:
    """Build one config model, without tables, from a Python caller's arguments.

    Raises: ConfigError with every fault.
    """
    given = Given(values, are_arguments=True)
    lists = {option.key for option in options(model) if _is_list(option.field.annotation)}
    read = {key: given.read(key, is_list=key in lists) for key in values}
    return _validated(model, read, ConfigFile.read(None), given)


def _validated(model: type[ModelT], values: Mapping[str, Any], source: "ConfigFile", given: Given) -> ModelT:
    """Build a config model; raise ConfigError with every fault."""
    known = list(options(model))
    texts = given.texts(known)
    faults = list(texts.values())
    try:
        built = model.model_validate(values)
    except ValidationError as error:
        details = [detail for detail in error.errors() if ".".join(map(str, detail["loc"])) not in texts]
        faults += [describe_fault(detail, source, given, known) for detail in details]
    if faults:
        raise ConfigError("\n".join(faults))
    return built


def _with_own_defaults(values: dict[str, Any], _: Mapping[str, Any]) -> None:
    """Keep fine-tuning's own defaults of [optim] when only some of its fields are set."""
    values.setdefault("sft", {})  # so that what is missing in it is named
    own = values.get("optim", {})
    if isinstance(own, dict):
        values["optim"] = FinetuneConfig.model_fields["optim"].get_default().model_dump(exclude_unset=True) | own


def _with_preset(values: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Put the fields of [model] over those of the preset, or over those that go with its width."""
    preset, own = flags.get("preset", values.get("preset")), values.get("model", {})
    if not isinstance(own, dict):
        return
    width = flags.get("model.hidden_size", own.get("hidden_size"))
    if isinstance(preset, str) and preset in get_args(PresetName):
        values["model"] = LlamaConfig.preset(preset).model_dump(exclude_unset=True) | own
    elif preset is None and width is not None:
        with suppress(ValueError, TypeError):  # validating the model reports a width that is none
            values["model"] = LlamaConfig.of_width(int(width)).model_dump(exclude_unset=True) | own


def _settle_length(values: dict[str, Any], flags: Mapping[str, Any], default_epochs: int) -> None:
    """Let a length given by hand decide: a flag for one replaces those in the file, and any limit the default one."""
    train = values.setdefault("train", {})
    if not isinstance(train, dict):
        return
    lengths = ("max_steps", "epochs")
    if any(f"train.{length}" in flags for length in lengths):
        for length in lengths:
            train.pop(length, None)
    limits = (*lengths, "max_time_s")
    if not any(train.get(limit) is not None or f"train.{limit}" in flags for limit in limits):
        train["epochs"] = default_epochs


@dataclass(frozen=True)
class ConfigFile:
    """A config file: its values, and its text, in which the line of a key is found."""

    path: Path | None
    text: str
    values: dict[str, Any]

    @staticmethod
    def read(path: Path | None) -> "ConfigFile":
        """Read a TOML or JSON file.

        Raises:
            ConfigError: the file is missing, is neither TOML nor JSON, or is not valid.
        """
        if path is None:
            return ConfigFile(None, "", {})
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(f"a config file must be TOML or JSON, {path} is YAML; write its keys as `key = value`")
        try:
            text = path.read_text(encoding="utf-8-sig")
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except FileNotFoundError as error:
            raise ConfigError(f"config file {path} does not exist{_similar_file(path)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config file {path} is not valid {path.suffix[1:] or 'TOML'}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} must hold a table of settings, got {type(values).__name__}")
        return ConfigFile(path, text, values)

    @property
    def is_of_finetuning(self) -> bool:
        """Whether the file configures a fine-tuning run: it names a model, or has the table of its data."""
        return isinstance(self.values.get("model"), str) or "sft" in self.values

    def line_of(self, keys: tuple[str, ...]) -> int | None:
        """Return the 1-based line that sets the key at this path; None if it is not found."""
        lines = self.text.splitlines()
        line = 0
        for depth, key in enumerate(keys):
            quoted = re.escape(key)
            is_last = depth == len(keys) - 1
            table = (
                rf'^\s*\[{re.escape(".".join(keys[: depth + 1]))}\]|^\s*"?{quoted}"?\s*[:=]|[{{,]\s*"?{quoted}"?\s*[:=]'
            )
            found = next((at for at in range(line, len(lines)) if re.search(table, lines[at])), None)
            if found is None:
                return line + 1 if depth and is_last else None
            line = found
        return line + 1 if lines else None


def describe_fault(detail: ErrorDetails, source: ConfigFile, given: Given, known: Sequence[Option]) -> str:
    """Return one validation error as rule, value, place and remedy."""
    keys = tuple(str(part) for part in detail["loc"])
    key = ".".join(keys)
    if detail["type"] == "missing":
        return f"{key} is required; {given.request(key)}, or set it in a config file"
    if detail["type"] == "extra_forbidden":
        fault = f"{key} is not a setting{_nearest(keys, known)}"
    else:
        reason = str(detail.get("ctx", {}).get("error", "")) or _rule(detail)
        fault = f"{key}: {reason}" if key else reason
    if key in given.values:
        return f"{fault} ({given.place(key)})"
    line = source.line_of(keys) if source.path and keys else None
    return f"{fault} ({source.path}, line {line})" if line else fault + (f" ({source.path})" if source.path else "")


def _rule(detail: ErrorDetails) -> str:
    message = detail["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _nearest(keys: tuple[str, ...], known: Sequence[Option]) -> str:
    leaves = {option.path[-1]: option.key for option in known}
    sections = {option.path[0]: option.path[0] for option in known if len(option.path) > 1}
    candidates = {**sections, **leaves}
    if keys[-1] in leaves:
        return f"; it is {leaves[keys[-1]]}"
    if (ours := elsewhere(keys[-1], leaves)) is not None:
        return f"; it is {leaves[ours[0]]}{''.join(f' = {value}' for value in ours[1:])}"
    match = difflib.get_close_matches(keys[-1], candidates, n=1)
    return f"; did you mean {candidates[match[0]]}?" if match else "; `entrenar config schema` lists all settings"


def _similar_file(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    names = sorted(entry.name for entry in parent.iterdir() if entry.suffix in (".toml", ".json"))
    match = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / match[0]}?" if match else ""


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # validating the file reports this table
        values = inner
    values[keys[-1]] = value


def _parse_flag(text: Any, *, is_list: bool) -> Any:
    """Read lists, tables and null as JSON, a list also as a,b,c; anything else stays text for the field to read."""
    if not isinstance(text, str):
        return text  # a caller in Python may give the value itself
    if text[:1] in "[{" or text == "null":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text.split(",") if is_list else text


def _kinds(annotation: Any) -> list[Any]:
    """Return the types that a setting may have, without None; those of a list are its items'."""
    if _is_union(annotation):
        return [kind for part in get_args(annotation) if part is not NoneType for kind in _kinds(part)]
    if get_origin(annotation) is tuple:
        return _kinds(get_args(annotation)[0])
    return [annotation]


def _takes_text(kinds: Sequence[Any]) -> bool:
    return any(kind in (str, Path) or get_origin(kind) is Literal for kind in kinds)


def _is_list(annotation: Any) -> bool:
    """Return whether an option holds a list, or a list or None."""
    alternatives = [part for part in get_args(annotation) if part is not NoneType] if _is_union(annotation) else []
    return get_origin(annotation) is tuple or (len(alternatives) == 1 and get_origin(alternatives[0]) is tuple)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _keep_truth_from_numbers(values: dict[str, Any], option: Option) -> None:
    """Turn true and false into text where a number is expected: pydantic would read them as 1 and 0."""
    alternatives = get_args(option.field.annotation) if _is_union(option.field.annotation) else ()
    if not {int, float} & {option.field.annotation, *alternatives}:
        return
    table: Any = values
    for name in option.path[:-1]:
        table = table.get(name) if isinstance(table, dict) else None
    if isinstance(table, dict) and isinstance(table.get(option.path[-1]), bool):
        table[option.path[-1]] = str(table[option.path[-1]]).lower()


def to_toml(config: AnyConfig) -> str:
    """Return a config as TOML that is read back as the same config; options without effect are left out."""
    idle = idle_options(config)
    lines: list[str] = []
    tables: list[str] = []
    for name, value in config:
        if isinstance(value, BaseModel):
            dumped = value.model_dump(mode="json", exclude_none=True)
            kept = [f"{key} = {_toml_value(item)}" for key, item in dumped.items() if f"{name}.{key}" not in idle]
            tables += ["", f"[{name}]", *kept] if kept else []
        elif value is not None and name != "preset":
            lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None)
            + " }"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(inner) for inner in value) + "]"
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value if isinstance(value, (bool, int, str)) else str(value), ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON allows a literal DEL, TOML does not

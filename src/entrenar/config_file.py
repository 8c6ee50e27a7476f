"""Reads a run's settings from a TOML or JSON file and from flags, and writes them.

Flags go over the file. All faults are reported at once, each with its rule, value, file and line, and the nearest
setting where a name is wrong.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from entrenar.config import AnyConfig, ConfigT, FinetuneConfig, Option, RunConfig, options
from entrenar.errors import ConfigError
from entrenar.model import LlamaConfig, PresetName


def load_config(file: Path | None, flags: Mapping[str, str] | None = None) -> RunConfig:
    """Read `file` (TOML or JSON), apply the flags (dotted key to text) over it, and validate the result.

    Raises:
        ConfigError: every fault in file and flags, in one message.
    """
    return _load(RunConfig, file, flags or {}, _expand_preset)


def load_finetune_config(file: Path | None, flags: Mapping[str, str] | None = None) -> FinetuneConfig:
    """Read the config of a fine-tuning run; see `load_config`."""
    return _load(FinetuneConfig, file, flags or {}, _expand_defaults)


def _load(
    model: type[ConfigT],
    file: Path | None,
    flags: Mapping[str, str],
    expand: Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]],
) -> ConfigT:
    source = ConfigFile.read(file)
    values = expand(source.values, flags)
    lists = {option.key for option in options(model) if _is_list(option.field.annotation)}
    for key, text in flags.items():
        _set(values, key.split("."), _parse_flag(text, is_list=key in lists))
    for option in options(model):
        _keep_truth_from_numbers(values, option)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = list(options(model))
        faults = [describe_fault(detail, source, flags, known) for detail in error.errors()]
        raise ConfigError("\n".join(faults)) from error


def _expand_defaults(values: Mapping[str, Any], _: Mapping[str, str]) -> dict[str, Any]:
    """Keep fine-tuning's own defaults of [train] and [optim] when only some of their fields are set."""
    expanded = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name in ("train", "optim"):
        own = expanded.get(name, {})
        default = FinetuneConfig.model_fields[name].get_default().model_dump(exclude_unset=True)
        expanded[name] = {**default, **own} if isinstance(own, dict) else own
    return expanded


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
        try:
            text = path.read_text(encoding="utf-8")
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


def describe_fault(detail: ErrorDetails, source: ConfigFile, flags: Mapping[str, str], known: Sequence[Option]) -> str:
    """Return one validation error as rule, value, place and remedy."""
    keys = tuple(str(part) for part in detail["loc"])
    key = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        fault = f"{key} is not a setting{_nearest(keys, known)}"
    else:
        reason = str(detail.get("ctx", {}).get("error", "")) or _rule(detail)
        fault = f"{key}: {reason}" if key else reason
    if key in flags:
        return f"{fault} (flag --{keys[-1].replace('_', '-')})"
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
    match = difflib.get_close_matches(keys[-1], candidates, n=1)
    return f"; did you mean {candidates[match[0]]}?" if match else "; `entrenar config schema` lists all settings"


def _similar_file(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    names = sorted(entry.name for entry in parent.iterdir() if entry.suffix in (".toml", ".json"))
    match = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / match[0]}?" if match else ""


def _expand_preset(values: Mapping[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    preset = flags.get("preset", values.get("preset"))
    expanded = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    if isinstance(preset, str) and preset in get_args(PresetName):
        own = expanded.get("model", {})
        base = LlamaConfig.preset(preset).model_dump(exclude_unset=True)
        expanded["model"] = {**base, **own} if isinstance(own, dict) else own
    train = expanded.setdefault("train", {})
    ends = ("max_steps", "epochs", "max_time_s")
    if isinstance(train, dict) and not any(end in train or f"train.{end}" in flags for end in ends):
        train["epochs"] = 1  # the default of a config that sets nothing of [train]
    return expanded


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # validating the file reports this table
        values = inner
    values[keys[-1]] = value


def _parse_flag(text: str, *, is_list: bool) -> Any:
    """Read lists, tables and null as JSON, a list also as a,b,c; anything else stays text for the field to read."""
    if text[:1] in "[{" or text == "null":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text.split(",") if is_list else text


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
    """Return a config as TOML that `load_config` reads back to the same config."""
    lines: list[str] = []
    nested: list[tuple[str, BaseModel]] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            nested.append((name, value))
        elif value is not None and name != "preset":
            lines.append(f"{name} = {_toml_value(value)}")
    for name, section in nested:
        dumped = section.model_dump(mode="json", exclude_none=True)
        lines += ["", f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in dumped.items())]
    return "\n".join(lines) + "\n"


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
    return json.dumps(value if isinstance(value, (bool, int, str)) else str(value), ensure_ascii=False)

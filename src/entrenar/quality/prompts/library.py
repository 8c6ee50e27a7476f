"""Find prompts, check what is set for them, and fill them in.

The workflow prompts come with the package; a project adds its own in `prompts/*.yaml`:

    prompts:
      - name: code-coverage
        title: Raise coverage
        variables: {TEST_CMD: make test}      # with its default; `null` has to be set
        text: |
          Run `{{ TEST_CMD }}` …  {{ facts.uncovered("src") }}

A variable that is not declared, and one that is not set, are refused.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from entrenar.errors import ConfigError, FormatError, MachineError
from entrenar.quality.prompts.facts import Facts

PROJECT_PROMPTS = Path("prompts")
_KEYS = {"name", "title", "variables", "text"}


@dataclass(frozen=True)
class Prompt:
    """A text with variables; a variable whose default is None has to be set."""

    name: str
    title: str
    variables: Mapping[str, str | None]
    text: str


def library(project: Path) -> dict[str, Prompt]:
    """Return the workflow prompts and the project's own, by name.

    Raises: FormatError for a file that holds no prompts; ConfigError for two prompts of one name.
    """
    found: dict[str, Prompt] = {}
    package = files("entrenar.quality.prompts").joinpath("workflow.yaml")
    texts = [("workflow.yaml", package.read_text(encoding="utf-8"))]
    texts += [(str(place), _text(place)) for place in sorted((project / PROJECT_PROMPTS).glob("*.yaml"))]
    for place_name, text in texts:
        for prompt in _prompts(text, place_name):
            if prompt.name in found:
                raise ConfigError(f"{place_name}: there is another prompt {prompt.name!r}; give it a name of its own")
            found[prompt.name] = prompt
    return found


def _text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise FormatError(f"{place} must be UTF-8: {fault}") from fault


def _prompts(text: str, place: str) -> Iterator[Prompt]:
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as missing:
        raise MachineError("prompts need PyYAML, which is missing; pip install 'entrenar[quality]'") from missing
    try:
        rows: Any = yaml.safe_load(text)["prompts"]
        for row in rows:
            if set(row) - _KEYS or not {"name", "title", "text"} <= set(row):
                raise KeyError(f"a prompt has {', '.join(sorted(_KEYS))}")
            variables = {str(key): None if value is None else str(value) for key, value in
                         (row.get("variables") or {}).items()}  # fmt: skip
            yield Prompt(str(row["name"]), str(row["title"]), variables, str(row["text"]))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as fault:
        raise FormatError(f"{place} holds no prompts: {fault}") from fault


def fill(prompt: Prompt, given: Mapping[str, str], project: Path) -> str:
    """Return a prompt's text with its variables and the facts that it asks for.

    Raises: ConfigError for a variable that it does not have, or that is not set; FormatError for a template fault.
    """
    unknown = sorted(set(given) - set(prompt.variables))
    if unknown:
        has = ", ".join(prompt.variables) or "none"
        raise ConfigError(f"prompt {prompt.name} has no variable {unknown[0]!r}; it has {has}")
    values = {**prompt.variables, **given}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"prompt {prompt.name} needs {', '.join(missing)}: pass --set {missing[0]}=VALUE")
    environment = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)
    try:
        # The variables' own text is never read as a template.
        return environment.from_string(prompt.text).render({**values, "facts": Facts(project)}).rstrip()
    except TemplateError as fault:
        raise FormatError(f"prompt {prompt.name} cannot be filled in: {fault}") from fault

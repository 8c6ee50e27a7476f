"""Findings of ruff, on its defaults and with our selection of rules, whatever the project's own settings are."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from entrenar.errors import MachineError
from entrenar.quality.debt.formula import LINT, LINT_IGNORED, LINT_IGNORED_IN_INIT, LINT_TARGET, lint_rule

_COMPLEXITY = re.compile(r"\((\d+) > 0\)$")
_CONFIG = ("lint.mccabe.max-complexity = 0", "lint.flake8-annotations.suppress-none-returning = true")


@dataclass(frozen=True)
class Linted:
    """One file: the cyclomatic complexity of the function at a line, and findings as (rule, line, message)."""

    cyclomatic: dict[int, int]
    findings: tuple[tuple[str, int, str], ...]


@cache
def version() -> str:
    """Return ruff's version.

    Raises: MachineError if it is not installed.
    """
    return subprocess.run([_ruff(), "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def _ruff() -> str:
    beside = Path(sys.executable).parent / "ruff"
    found = str(beside) if beside.exists() else shutil.which("ruff")
    if found is None:
        raise MachineError("the score needs ruff, which is not installed; pip install 'entrenar[quality]'")
    return found


def lint(texts: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Linted]:
    """Lint each text, given by a key; `names` are the file names: they decide which names are public.

    Raises: MachineError if ruff is missing or fails.
    """
    with tempfile.TemporaryDirectory(prefix="entrenar-lint-") as folder:
        keys = {}
        for index, (key, text) in enumerate(texts.items()):
            place = Path(folder) / str(index)
            place.mkdir()
            (place / names[key]).write_bytes(text.encode("utf-8", "surrogatepass"))
            keys[str(index)] = key
        found = _run(Path(folder))
    cyclomatic: dict[str, dict[int, int]] = {key: {} for key in texts}
    findings: dict[str, list[tuple[str, int, str]]] = {key: [] for key in texts}
    for row in found:
        file = Path(row["filename"])
        key, code, line = keys[file.parent.name], row["code"], row["location"]["row"]
        rule = lint_rule(code)
        if complexity := _COMPLEXITY.search(row["message"]):
            cyclomatic[key][line] = int(complexity[1])
        elif rule and not (file.name == "__init__.py" and code in LINT_IGNORED_IN_INIT):
            findings[key].append((rule, line, f"{code} {row['message']}"))
    return {key: Linted(cyclomatic[key], tuple(sorted(findings[key], key=lambda row: row[1:]))) for key in texts}


def _run(folder: Path) -> list[dict[str, Any]]:
    command = [_ruff(), "check", "--isolated", "--no-cache", "--ignore-noqa", "--exit-zero", "--output-format", "json",
               "--target-version", LINT_TARGET, "--select", ",".join([*LINT, "C901"]),
               "--ignore", ",".join(LINT_IGNORED)]  # fmt: skip
    command += [word for line in _CONFIG for word in ("--config", line)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
    except json.JSONDecodeError as fault:
        raise MachineError(f"ruff {version()} failed: {done.stderr.strip() or fault}") from fault
    return rows

"""Run a command of a gate or a criterion and say how it ended: passed, failed, or not measured.

0 is passed and 1 is failed. Any other code, a missing program, and a time-out are not measured: pytest ends with 5
if it finds no test, ruff and mypy with 2 if they cannot run, and none of these may pass or be taken for a finding.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entrenar.errors import ConfigError

Verdict = Literal["passed", "failed", "not measured"]
_TAIL_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its exit, its duration, and all that it printed."""

    verdict: Verdict
    elapsed_s: float
    output: str
    reason: str = ""

    def tail(self) -> str:
        """Return the last lines of the output."""
        return "\n".join(self.output.strip().splitlines()[-_TAIL_LINES:])


def run(command: str, folder: Path, timeout_s: float, source: Path | None = None) -> Outcome:
    """Run a command in a folder: words as a shell would split them, but no shell.

    Programs of this Python's environment are found first. `source` is put before the installed packages.

    Raises: ConfigError for unbalanced quotes or an empty command.
    """
    started = time.monotonic()
    try:
        done = subprocess.run(
            words_of(command), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            timeout=timeout_s, env=_environment(source), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError) as missing:
        return Outcome("not measured", time.monotonic() - started, "", f"{missing.filename} cannot be run")
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode("utf-8", "replace")
        return Outcome("not measured", time.monotonic() - started, text, f"not done after {timeout_s:g} s")
    verdict: Verdict = "passed" if done.returncode == 0 else "failed" if done.returncode == 1 else "not measured"
    reason = f"ended with {done.returncode}" if verdict == "not measured" else ""
    return Outcome(verdict, time.monotonic() - started, done.stdout.decode("utf-8", "replace"), reason)


def words_of(command: str) -> list[str]:
    """Return the words of a command.

    Raises: ConfigError for unbalanced quotes or an empty command.
    """
    try:
        words = shlex.split(command)
    except ValueError as fault:
        raise ConfigError(f"a command must be words with balanced quotes: {command!r} ({fault})") from fault
    if not words:
        raise ConfigError("a command must not be empty")
    return words


def _environment(source: Path | None) -> dict[str, str]:
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if source is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH", "")]))
    return environment

"""Whatever output and locale a command is given, it ends with one of its own codes and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    ["--help"], ["train", "--help-all"], ["config", "print"], ["runs", "list", "--json"], ["doctor", "no-such"],
    ["plan", "--preset", "nope"], ["quality", "prompt", "--list"], ["prepare", "/no/ß/text", "--out", "x"],
    ["generate", "no/ß", "--top-p", "é"],
]  # fmt: skip
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
}


def _check(done: subprocess.CompletedProcess) -> None:
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2, 3, 5, 141)


def _run(words: list[str], folder: Path, changes: dict[str, str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, **changes}, cwd=folder,
        check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("locale", sorted(LOCALES))
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_any_locale_will_do(command, locale, tmp_path):
    """Letters that a locale does not have are written in another way, also in an error."""
    words = [sys.executable, "-m", "entrenar", *command]
    _check(_run(words, tmp_path, LOCALES[locale], stdout=subprocess.PIPE))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_output_that_is_closed_or_full_is_an_error(command, tmp_path):
    """Nowhere to write, or no space there: a code, and a sentence where one can be written."""
    words = [sys.executable, "-m", "entrenar", *command]
    _check(_run(["sh", "-c", 'exec "$@" >&-', "sh", *words], tmp_path, {}, stdout=subprocess.DEVNULL))
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full:
            _check(_run(words, tmp_path, {}, stdout=full))

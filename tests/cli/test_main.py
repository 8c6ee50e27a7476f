"""The front door: whatever goes wrong, wherever the output goes, a command ends with a sentence and an exit code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from entrenar.cli import configs
from entrenar.cli.main import main
from entrenar.errors import ConfigError, DiskFullError, TrainingHalted


def _entrenar(*words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300} | options
    return subprocess.run([sys.executable, "-m", "entrenar", *words], check=False, **given)


class _Positive(BaseModel):
    temperature: float = Field(ge=0)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("lr must be > 0"), 2, "ConfigError: lr must be > 0"),
        (TrainingHalted("spike"), 1, "TrainingHalted: spike"),
        (DiskFullError("no space"), 3, "DiskFullError: no space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "OutOfMemoryError: memory ran out (MemoryError); `entrenar plan` shows what fits"),
        (RuntimeError("std::bad_alloc"), 3, "OutOfMemoryError: memory ran out (std::bad_alloc)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 2, "No such file or directory: /x"),
        (OSError(errno.EIO, "Input/output error", "/x"), 3, "Input/output error: /x"),
        (OSError(errno.ENOSPC, "No space left"), 3, "MachineError: cannot write the output: No space left"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "DataError: text must be UTF-8"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_a_sentence_and_a_code(monkeypatch, capsys, error, code, said):
    """Our errors, the machine's and the user's interrupt each have their exit code; nothing is a traceback."""
    monkeypatch.setattr(configs, "run", lambda _: (_ for _ in ()).throw(error))
    assert main(["config"]) == code
    assert capsys.readouterr().err.strip().removeprefix("entrenar config: ").startswith(said)


def test_an_option_of_a_wrong_kind_is_named(monkeypatch, capsys):
    """A pydantic fault that a command did not turn into ours names the option and the value."""
    monkeypatch.setattr(configs, "run", lambda _: _Positive(temperature=-1))
    assert main(["config"]) == 2
    assert "ConfigError: temperature: Input should be greater than or equal to 0, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), KeyError("bug")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    """What is no fault of the user or the machine is not hidden."""
    monkeypatch.setattr(configs, "run", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="bug"):
        main(["config"])


def test_a_misspelt_command_is_told_the_nearest(capsys):
    """`trian` is answered with train; a word like no command with all of them."""
    assert main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "the commands are quickstart, prepare, train" in capsys.readouterr().err


def test_help_and_a_wrong_flag_return_a_code(capsys):
    """The way in which argparse ends a process does not reach the caller."""
    assert main(["config", "schema", "--help"]) == 0
    assert main(["config", "no-such-action"]) == 2
    assert "usage: entrenar config" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_exit_code_3():
    """Output that cannot be written is an error of the machine, told once."""
    with Path("/dev/full").open("wb") as full:
        ended = _entrenar("config", "schema", stdout=full)
    assert ended.returncode == 3
    assert ended.stderr.decode().strip() == (
        "entrenar config: MachineError: cannot write the output: No space left on device"
    )


def test_a_reader_that_left_ends_the_command_quietly():
    """`entrenar … | head` ends as other programs do."""
    read, write = os.pipe()
    os.close(read)
    ended = _entrenar("config", "schema", stdout=write)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_closed_streams_are_no_error():
    """Without standard output and error a command does its work all the same."""
    script = f'exec "{sys.executable}" -m entrenar config schema >&- 2>&-'
    assert subprocess.run(["sh", "-c", script], check=False, timeout=300).returncode == 0


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_our_characters_gets_them_escaped(environment):
    """In an ASCII terminal the help's ellipsis is written as an escape or as UTF-8, and nothing fails."""
    ended = _entrenar("--help", env={**os.environ, **environment})
    assert ended.returncode == 0
    assert b"usage: entrenar COMMAND \\u2026" in ended.stdout or "COMMAND …".encode() in ended.stdout

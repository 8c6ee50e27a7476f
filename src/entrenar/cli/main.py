"""`entrenar COMMAND …`: find the command, run it, turn its errors into a message and an exit code.

Commands are imported when they are called, so that `entrenar --help` answers without loading torch.
"""

import difflib
import errno
import importlib
import sys
from collections.abc import Sequence

from entrenar.cli import streams
from entrenar.errors import EntrenarError, MachineError, OutOfMemoryError
from entrenar.version import __version__

COMMANDS = {
    "quickstart": "train a first model in five minutes and see what it learned",
    "prepare": "tokenize text, code, jsonl or parquet into shards, training a tokenizer first if needed",
    "train": "pre-train from a config file, or resume",
    "finetune": "teach a model a task from a file of rows: all weights, or a LoRA adapter",
    "data": "show the rows of a fine-tuning file with the trained tokens marked, or check them",
    "generate": "continue a prompt",
    "chat": "talk with a model in the terminal",
    "convert": "write a model in another format, and prove the file: hf, gguf, llama2c, nf4",
    "eval": "held-out loss, perplexity and bits per byte of a model",
    "merge": "merge an adapter into the weights of its base, and measure the change",
    "runs": "list, show, compare or delete runs",
    "watch": "see a run while it trains, in the terminal or in the browser",
    "replay": "take a step again whose alarm stopped the run, and compare the bits",
    "report": "one HTML page about a run, or several compared",
    "config": "print, validate, diff, or give the JSON schema of run configs",
    "trace": "see where a program's time goes: spans, system calls with their Python lines, anomalies",
    "quality": "what the tests notice (mutants) and reach (coverage), by risk",
    "verify": "prove and measure the operations; print one certificate for each",
    "plan": "predict memory, time and disk of a run, and what to change if it does not fit",
    "doctor": "check the machine and the install, or a run: what happened, what is whole, what next",
    "completion": "print a script that completes commands in bash or zsh",
}
_MODULES = {"eval": "evaluate", "config": "configs"}
_INTERRUPTED, _BROKEN_PIPE = 130, 141
# Errors that name no file: those of the output, since commands name the files that they write.
_FULL_OR_GONE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)

_PROLOG = """usage: entrenar COMMAND …

Train and fine-tune LLaMA models, with proof that the result is right.
"""
_EPILOG = """
Exit codes: 0 done; 1 a gate failed or a training alarm stopped the run; 2 wrong input; 3 the machine failed (memory,
disk); 5 not measured.
Start with `entrenar quickstart`, or `entrenar COMMAND --help`.
"""


def overview() -> str:
    """Return what `entrenar --help` prints."""
    rows = "\n".join(f"  {name:<10} {line}" for name, line in COMMANDS.items())
    return f"{_PROLOG}\n{rows}\n{_EPILOG}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams.prepare()
    try:
        code = _run(words)
        sys.stdout.flush()
    except SystemExit as end:  # argparse, after --help or a wrong flag
        return end.code if isinstance(end.code, int) else 0
    except (EntrenarError, KeyboardInterrupt, OSError, MemoryError, RuntimeError, ValueError) as error:
        if (ending := _ending(error)) is None:
            raise
        code, reason = ending
        if reason:
            streams.tell(f"entrenar {words[0]}: {reason}")
    return code


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"entrenar {__version__}")
        return 0
    if words[0] not in COMMANDS:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        streams.tell(f"entrenar: no command {words[0]!r}; {remedy}")
        return 2
    module = importlib.import_module(f"entrenar.cli.{_MODULES.get(words[0], words[0])}")
    return int(module.run(words[1:]))


def _ending(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the message for an error; None for one that is a bug of this program."""
    if isinstance(error, EntrenarError):
        return error.exit_code, f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    if isinstance(error, OSError):
        return _os_ending(error)
    if isinstance(error, ValueError):
        return _value_ending(error)
    from entrenar.train import is_oom  # noqa: PLC0415  # torch is loaded already

    if not is_oom(error):
        return None
    reason = str(error).partition("\n")[0] or type(error).__name__
    return OutOfMemoryError.exit_code, f"OutOfMemoryError: memory ran out ({reason}); `entrenar plan` shows what fits"


def _value_ending(error: ValueError) -> tuple[int, str] | None:
    from pydantic import ValidationError  # noqa: PLC0415  # loaded already, if it is one

    if isinstance(error, ValidationError):
        faults = (f"{'.'.join(map(str, f['loc']))}: {f['msg']}, got {f['input']!r:.100}" for f in error.errors())
        return 2, "ConfigError: " + "\n".join(faults)
    if isinstance(error, UnicodeError):
        return 2, f"DataError: text must be UTF-8: {error}"
    return None


def _os_ending(error: OSError) -> tuple[int, str]:
    if error.filename is not None:
        code = 2 if error.errno in _WRONG_PATH else MachineError.exit_code
        return code, f"{error.strerror}: {error.filename}"
    streams.abandon_output()
    if isinstance(error, BrokenPipeError):
        return _BROKEN_PIPE, ""
    place = "cannot write the output: " if error.errno in _FULL_OR_GONE else ""
    return MachineError.exit_code, f"MachineError: {place}{error.strerror or error}"

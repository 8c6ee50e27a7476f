"""`entrenar COMMAND …`: find the command, run it, turn its errors into a message and an exit code.

Commands are imported when they are called, so that `entrenar --help` answers without loading torch.
"""

import importlib
import sys
from collections.abc import Sequence

from entrenar import __version__
from entrenar.errors import EntrenarError

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
    "report": "one HTML page about a run, or several compared",
    "config": "print, validate, diff, or give the JSON schema of run configs",
    "trace": "see where a program's time goes: spans, system calls with their Python lines, anomalies",
    "quality": "what the tests notice (mutants) and reach (coverage), by risk",
    "verify": "prove and measure the operations; print one certificate for each",
    "plan": "predict memory, time and disk of a run, and what to change if it does not fit",
    "doctor": "check the machine and the install",
}
_MODULES = {"eval": "evaluate", "config": "configs"}

_PROLOG = """usage: entrenar COMMAND …

Train and fine-tune LLaMA models, with proof that the result is right.
"""
_EPILOG = """
Exit codes: 0 done; 1 a gate failed or a training alarm stopped the run; 2 wrong input; 3 the machine failed (memory,
disk); 5 not measured.
Start with `make quickstart`, or `entrenar COMMAND --help`.
"""


def overview() -> str:
    """Return what `entrenar --help` prints."""
    rows = "\n".join(f"  {name:<10} {line}" for name, line in COMMANDS.items())
    return f"{_PROLOG}\n{rows}\n{_EPILOG}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"entrenar {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"entrenar: no command {words[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"entrenar.cli.{_MODULES.get(words[0], words[0])}")
    try:
        return int(module.run(words[1:]))
    except EntrenarError as error:
        print(f"entrenar {words[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nentrenar {words[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141

"""`entrenar chat MODEL`: talk with a model in the terminal.

    /reset          forget the conversation
    /system TEXT    forget it and start again with this instruction; without TEXT, with none
    /quit           quit (so does end of input)

When a conversation outgrows the context, the oldest exchange is forgotten, with a notice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar import infer, recipe
from entrenar.cli import flags
from entrenar.errors import ConfigError, DataError, FormatError
from entrenar.infer import ChatConfig

if TYPE_CHECKING:
    from entrenar.infer import ChatSession

_COMMANDS = "/reset starts over, /system TEXT starts over with an instruction, /quit quits"


def run(words: Sequence[str]) -> int:
    """Chat until the end of input; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    config = flags.from_fields(parsed, ChatConfig)
    template = None if parsed.template is None else _template(parsed.template)
    import torch  # noqa: PLC0415  # seconds, which neither --help nor a usage error needs

    from entrenar.data import Tokenizer  # noqa: PLC0415
    from entrenar.data.sft.chat_template import ChatTemplate  # noqa: PLC0415

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    model, tokenizer = recipe.open_model(parsed.model, dtype=torch.float32)
    if template is not None:
        tokenizer = Tokenizer(dict(tokenizer.content), {**tokenizer.config, "chat_template": template})
    if parsed.eos is not None:
        ends = infer.named_tokens(tokenizer, parsed.eos, model.config.vocab_size)
        config = config.model_copy(update={"eos_token_ids": ends})
    with ChatTemplate(tokenizer) as chat:
        conversation = infer.ChatSession(model, tokenizer, chat, config)
        conversation.reset(parsed.system)
        if sys.stdin.isatty():
            print(_COMMANDS)
        _talk(conversation)
    return 0


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template must be a text file with a chat template, got {path}: {error}") from error


def _talk(conversation: "ChatSession") -> None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset(conversation.system)
        elif command == "/system":
            conversation.reset(rest.strip() or None)
        elif command.startswith("/"):
            print(f"no command {command}; {_COMMANDS}")
        elif line:
            _say(conversation, line)


def _say(conversation: "ChatSession", line: str) -> None:
    try:
        for piece in conversation.answer(
            line, lambda: print("(forgot the oldest exchange: the conversation no longer fits the context)")
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    except (DataError, FormatError) as error:
        print(f"{error}; say it another way, or start over with /reset or /system", file=sys.stderr)


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("chat", f"Talk with a model in the terminal; {_COMMANDS}.")
    arguments.add_argument("model", type=Path, help="a run, a model folder, a .gguf or a .bin")
    arguments.add_argument("--system", help="instruction to start with")
    arguments.add_argument("--template", type=Path, help="file with a chat template to use instead of the model's")
    arguments.add_argument(
        "--eos", nargs="+", metavar="TOKEN", help="names or ids of the tokens that end an answer (default: the model's)"
    )
    arguments.add_argument("--threads", type=flags.thread_count, help="CPU threads")
    flags.add_field_flags(arguments, ChatConfig, leave_out=("eos_token_ids",))
    return arguments

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

import torch

from entrenar import recipe
from entrenar.cli import flags
from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import DataError
from entrenar.infer import ChatSession, GenerateConfig

_COMMANDS = "/reset starts over, /system TEXT starts over with an instruction, /quit quits"


def run(words: Sequence[str]) -> int:
    """Chat until the end of input; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    model, tokenizer = recipe.open_model(parsed.model, dtype=torch.float32)
    if parsed.template is not None:
        content = {**tokenizer.config, "chat_template": parsed.template.read_text("utf-8")}
        tokenizer = Tokenizer(dict(tokenizer.content), content)
    config = GenerateConfig(
        max_new_tokens=parsed.max_new_tokens, temperature=parsed.temperature, top_p=parsed.top_p, seed=parsed.seed
    )
    with ChatTemplate(tokenizer) as chat:
        conversation = ChatSession(model, tokenizer, chat, config)
        conversation.reset(parsed.system)
        if sys.stdin.isatty():
            print(_COMMANDS)
        _talk(conversation)
    return 0


def _talk(conversation: ChatSession) -> None:
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


def _say(conversation: ChatSession, line: str) -> None:
    try:
        for piece in conversation.answer(
            line, lambda: print("(forgot the oldest exchange: the conversation no longer fits the context)")
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    except DataError as error:
        print(error, file=sys.stderr)


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("chat", f"Talk with a model in the terminal; {_COMMANDS}.")
    arguments.add_argument("model", type=Path, help="a run, a model folder, a .gguf or a .bin")
    arguments.add_argument("--system", help="instruction to start with")
    arguments.add_argument("--template", type=Path, help="file with a chat template to use instead of the model's")
    arguments.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    arguments.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the most likely token (default: 0.7)"
    )
    arguments.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="choose among the fewest tokens that reach this probability (default: 0.9)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of the random choices (default: 0)")
    arguments.add_argument("--threads", type=flags.positive, help="CPU threads")
    return arguments

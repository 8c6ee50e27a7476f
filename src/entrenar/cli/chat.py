"""`entrenar chat MODEL`: talk with a model in the terminal.

    /reset          forget the conversation
    /system TEXT    forget it and begin anew with this instruction; without TEXT, with none
    /quit           end (so does end of input)

A conversation that outgrows the context loses its oldest exchange, and says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from entrenar import recipe
from entrenar.cli import flags
from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import DataError, EntrenarError
from entrenar.infer import GenerateConfig, generate
from entrenar.model import Llama

_COMMANDS = "/reset forgets, /system TEXT begins anew with an instruction, /quit ends"


class Conversation:
    """The messages so far, and the model's next one."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, chat: ChatTemplate, config: GenerateConfig) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._system: str | None = None
        self.messages: list[dict[str, str]] = []

    def reset(self, system: str | None = None) -> None:
        """Forget everything and begin with an instruction."""
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The instruction."""
        return self._system

    def answer(self, text: str, forgot: Callable[[], None]) -> Iterator[str]:
        """Yield the model's answer to `text` in pieces; `forgot` is called for each exchange that no longer fits.

        Raises:
            DataError: the text spells a control token, or alone does not fit. It is then not part of the talk.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._ids_that_fit(forgot)
        except EntrenarError:
            del self.messages[before:]
            raise
        stream = self._tokenizer.decode_stream(ids)
        ends = self._ends()
        said: list[str] = []
        for (token,) in generate(self._model, [ids], self._config, self._generator):
            if token is None or token in ends:
                break
            said.append(stream.push(token))
            yield said[-1]
        said.append(stream.finish())
        yield said[-1]
        self.messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _ids_that_fit(self, forgot: Callable[[], None]) -> list[int]:
        room = self._model.config.context_length
        first = 0 if self._system is None else 1
        while True:
            ids = self._chat.encode(self.messages, add_generation_prompt=True)
            if len(ids) < room:
                return ids
            if len(self.messages) - first < 3:
                raise DataError(f"the message has {len(ids)} tokens with its frame, the model's context is {room}")
            del self.messages[first : first + 2]
            forgot()

    def _ends(self) -> frozenset[int]:
        """Return the tokens that end a turn: the config's, the tokenizer's, and the names that chat models use."""
        names = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>")
        found = {self._tokenizer.id_of(name) for name in names} | {self._tokenizer.eos_id}
        own = self._config.eos_token_ids or self._model.config.eos_token_ids
        return frozenset(index for index in found if index is not None) | frozenset(own)


def run(words: Sequence[str]) -> int:
    """Talk until the end of input; return the exit code."""
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
        conversation = Conversation(model, tokenizer, chat, config)
        conversation.reset(parsed.system)
        if sys.stdin.isatty():
            print(_COMMANDS)
        _talk(conversation)
    return 0


def _talk(conversation: Conversation) -> None:
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


def _say(conversation: Conversation, line: str) -> None:
    try:
        for piece in conversation.answer(line, lambda: print("(the oldest exchange no longer fits and is forgotten)")):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    except DataError as error:
        print(error, file=sys.stderr)


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("chat", f"Talk with a model in the terminal; {_COMMANDS}.")
    arguments.add_argument("model", type=Path, help="a run, a model folder, a .gguf or a .bin")
    arguments.add_argument("--system", help="instruction to begin with")
    arguments.add_argument("--template", type=Path, help="file with a chat template, instead of the model's")
    arguments.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    arguments.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest (default: 0.7)")
    arguments.add_argument("--top-p", type=float, default=0.9, help="share of the likeliest tokens (default: 0.9)")
    arguments.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    arguments.add_argument("--threads", type=int, help="CPU threads")
    return arguments

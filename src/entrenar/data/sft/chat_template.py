"""Chat templates: from messages to the text, and the tokens, that a chat model was trained on.

A template is a program (jinja2) that comes with a model from a stranger. It runs in a process of its own: in jinja2's
sandbox, its memory bounded by the kernel, its time and its text by us. No bound inside of one process would do, since
`"a" * 10**10` or three nested loops ask no one. Variables and settings are those of Hugging Face's
`apply_chat_template`, save the clock: a text must not depend on the day.

A message whose text spells a control token is refused: as a token it would end the turn and speak for the other side.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from entrenar.data.sft import chat_worker
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError, FormatError

RENDER_TIMEOUT_S = 10.0
Message = Mapping[str, Any]


class ChatTemplate:
    """A tokenizer's chat template, at work in its own process; use it in a `with` statement, or call `close`."""

    def __init__(self, tokenizer: Tokenizer, *, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        """Take the template of `tokenizer`.

        Raises: DataError if it has none.
        """
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat_template; add one to tokenizer_config.json or chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        self._timeout_s = timeout_s
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._tokens = {name: "" if index is None else tokenizer.name_of(index) for name, index in names.items()}
        self._control = [tokenizer.name_of(index) for index in sorted(tokenizer.special_ids)]
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """Return the text of `messages`, each with `role` and `content`.

        Raises:
            FormatError: the template is faulty, refuses the messages, or takes too much time, memory or text.
        """
        given = {
            **self._tokens,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._ask(json.dumps(given))
        if "error" in answer:
            raise FormatError(f"chat_template: {answer['error']}")
        return answer["text"]

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> list[int]:
        """Return the tokens of `messages`; control tokens come from the template only.

        Raises:
            DataError: a message spells a control token.
            FormatError: as `render`.
        """
        for number, message in enumerate(messages):
            for name in self._control:
                if name in str(message.get("content", "")) or name in str(message.get("role", "")):
                    raise DataError(f"message {number} spells the control token {name!r}, which would forge a turn")
        text = self.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self._tokenizer.encode(text, allow_special=True)

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _ask(self, line: str) -> dict[str, str]:
        try:
            if self._worker is None:
                # -I: neither the environment nor the current folder decide what the worker imports
                command = [sys.executable, "-I", str(Path(chat_worker.__file__))]
                self._worker = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                self._send(self._worker, json.dumps(self._template))
            self._send(self._worker, line)
            answer: dict[str, str] = json.loads(self._receive(self._worker))
        except (BrokenPipeError, ValueError) as error:
            self.close()
            raise FormatError("chat_template: it ended the process that renders it (memory?)") from error
        return answer

    @staticmethod
    def _send(worker: subprocess.Popen[bytes], line: str) -> None:
        assert worker.stdin is not None  # noqa: S101  # opened with PIPE
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()

    def _receive(self, worker: subprocess.Popen[bytes]) -> bytes:
        assert worker.stdout is not None  # noqa: S101  # opened with PIPE
        deadline = time.monotonic() + self._timeout_s
        received = b""
        while not received.endswith(b"\n"):
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not select.select([worker.stdout], [], [], remaining_s)[0]:
                self.close()
                raise FormatError(f"chat_template: it was not done after {self._timeout_s:g} s")
            block = worker.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a pipe is a BufferedReader
            if not block:
                break
            received += block
        return received

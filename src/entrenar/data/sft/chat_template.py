"""Chat templates: from messages to the text, and the tokens, that a chat model was trained on.

A template is a program (jinja2) that a stranger wrote. It runs in jinja2's sandbox, in a separate process whose memory
and CPU time the kernel limits: no check inside one process stops `"a" * 10**10` or three nested loops. Only CPU time
counts, so neither a busy machine nor the start of the process makes a template fail. Variables and settings are Hugging
Face's (`apply_chat_template`), except the clock: a text must not depend on the day.

A message whose text spells a control token is refused: as a token it would end the turn and speak for the other side.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from entrenar.data.sft import chat_worker
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError, FormatError

MAX_CPU_S = 10.0
Message = Mapping[str, Any]


class TemplateStoppedError(FormatError):
    """A template used up its CPU time or its memory; it would do so again for the next row."""


class ChatTemplate:
    """A tokenizer's chat template, rendered in a separate process; use it in a `with` statement, or call `close`."""

    def __init__(self, tokenizer: Tokenizer, *, cpu_s: float = MAX_CPU_S) -> None:
        """Take the template of `tokenizer`; compiling it and rendering one text may each take `cpu_s` of CPU time.

        Raises: DataError if it has none.
        """
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat_template; add one to tokenizer_config.json or chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        self._cpu_s = cpu_s
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
            FormatError: the template is faulty, refuses the messages, or writes too much text.
            TemplateStoppedError: it takes too much CPU time or memory.
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
            worker = self._running()
            self._send(worker, line)
            return self._receive(worker)
        except (BrokenPipeError, ValueError) as error:
            raise TemplateStoppedError(f"chat_template: {self._why_it_ended()}") from error

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process; start one if there is none, or if it ended with the thread that had started it."""
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            # -I: neither the environment nor the current folder decide what the worker imports
            script = [sys.executable, "-I", str(Path(chat_worker.__file__))]
            self._worker = subprocess.Popen(
                [*script, str(self._cpu_s), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._send(self._worker, json.dumps(self._template))
        return self._worker

    @staticmethod
    def _send(worker: subprocess.Popen[bytes], line: str) -> None:
        """Write a line; the worker reads it, or its CPU limit ends it and breaks the pipe."""
        assert worker.stdin is not None  # noqa: S101  # opened with PIPE
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()

    @staticmethod
    def _receive(worker: subprocess.Popen[bytes]) -> dict[str, str]:
        assert worker.stdout is not None  # noqa: S101  # opened with PIPE
        answer: dict[str, str] = json.loads(worker.stdout.readline())
        return answer

    def _why_it_ended(self) -> str:
        worker = self._worker
        assert worker is not None  # noqa: S101  # it just answered, badly or not at all
        worker.communicate()
        self._worker = None
        if worker.returncode == -signal.SIGPROF:
            return f"it took more than {self._cpu_s:g} s of CPU time for one text; use a simpler template"
        return "it ended the process that renders it, probably for lack of memory; use a simpler template"

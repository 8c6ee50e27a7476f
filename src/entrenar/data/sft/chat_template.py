"""Turn messages into the text and tokens that a chat model was trained on, with its chat template.

A template is a program (jinja2) that a stranger wrote. It runs in jinja2's sandbox, in a separate process whose memory
and CPU time the kernel limits: no check inside one process stops `"a" * 10**10` or three nested loops. Only CPU time
counts, so neither a busy machine nor the start of the process makes a template fail.

Templates, variables and settings are those of Hugging Face's `apply_chat_template`: `tools` and `documents` are None
when there are none, special tokens are variables under their roles' names, a message loses the keys whose value is
None, reasoning has the names `reasoning_content` and `thinking`, and messages with tools get the template `tool_use`
where the tokenizer has several.

A message that spells a control token is refused: as a token it would end the turn and speak for the other side.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from entrenar.data.sft import chat_worker
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError, FormatError

MAX_CPU_S = 10.0
REASONING = ("reasoning_content", "thinking", "reasoning")
Message = Mapping[str, Any]
Span = tuple[int, int]


class TemplateStoppedError(FormatError):
    """A template used up its CPU time or its memory; it would do so again for the next row."""


@dataclass(frozen=True)
class Rendering:
    """The text of messages, and its spans that the template marks as generated (`{% generation %}`)."""

    text: str
    generated: tuple[Span, ...]


class ChatTemplate:
    """A tokenizer's chat template, rendered in a separate process; use it in a `with` statement, or call `close`."""

    def __init__(self, tokenizer: Tokenizer, *, today: str | None = None, cpu_s: float = MAX_CPU_S) -> None:
        """Take the template of `tokenizer`; compiling it and rendering one text may each take `cpu_s` of CPU time.

        `today` (YYYY-MM-DD) is the date that `strftime_now` gives, the clock's if None.

        Raises: DataError if it has none.
        """
        self._templates = tokenizer.chat_templates
        if not self._templates:
            raise DataError(
                "the tokenizer has no chat_template; add one to tokenizer_config.json or chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._arguments = (str(cpu_s), str(os.getpid()), today or "")
        control = [tokenizer.name_of(index) for index in sorted(tokenizer.special_ids)]
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        self._processes: dict[str, _Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return the text of `messages`; see `rendering`."""
        return self.rendering(messages, **variables).text

    def rendering(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendering:
        """Return the text of `messages`, each with `role` and `content`, and of what the model says in them.

        Raises:
            DataError: the tokenizer names several templates, and none of them fits.
            FormatError: the template is faulty, refuses the messages, or writes too much text.
            TemplateStoppedError: it takes too much CPU time or memory.
        """
        given = {
            **self._tokenizer.special_tokens,
            "documents": None,
            **variables,
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = self._name(has_tools=tools is not None)
        process = self._processes.setdefault(name, _Process(self._templates[name], self._arguments))
        answer = process.ask(json.dumps(given))
        if "error" in answer:
            raise FormatError(f"chat_template: {answer['error']}")
        return Rendering(answer["text"], tuple((start, end) for start, end in answer["spans"]))

    def encode(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, **variables: Any) -> list[int]:
        """Return the tokens of `messages`; control tokens come from the template only.

        Raises:
            DataError: a message spells a control token.
            FormatError: as `rendering`.
        """
        self.refuse_forgery(messages, tools)
        return self._tokenizer.encode(self.render(messages, tools=tools, **variables), allow_special=True)

    def refuse_forgery(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> None:
        """Refuse messages or tools that spell a control token.

        Raises: DataError.
        """
        places = [("the list of tools", tools), *((f"message {n}", message) for n, message in enumerate(messages))]
        for place, value in places:
            found = next((match for text in _texts(value) if (match := self._control.search(text))), None)
            if found is not None:
                raise DataError(f"{place} spells the control token {found[0]!r}, which would forge a turn")

    def source(self, *, has_tools: bool) -> str:
        """Return the template that writes messages, with tools or without.

        Raises: DataError if the tokenizer names several templates, and none of them fits.
        """
        return self._templates[self._name(has_tools=has_tools)]

    def before_token(self, text: str, place: int) -> int:
        """Return `place`, or where the control token starts that it lies in."""
        inside = (found.start() for found in self._control.finditer(text) if found.start() < place < found.end())
        return next(inside, place)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _name(self, *, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise DataError(
                f"the tokenizer must have a chat template named 'default', got {', '.join(sorted(self._templates))}; "
                "rename one of them in tokenizer_config.json"
            )
        return name


class _Process:
    """One template in its process, started with the first question."""

    def __init__(self, template: str, arguments: Sequence[str]) -> None:
        self._template, self._arguments = template, arguments
        self._worker: subprocess.Popen[bytes] | None = None

    def ask(self, line: str) -> dict[str, Any]:
        """Return the worker's answer to a line.

        Raises: TemplateStoppedError.
        """
        try:
            worker = self._running()
            self._send(worker, line)
            assert worker.stdout is not None  # noqa: S101  # opened with PIPE
            answer: dict[str, Any] = json.loads(worker.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise TemplateStoppedError(f"chat_template: {self._why_it_ended()}") from error
        return answer

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process; start one if there is none, or if it ended with the thread that had started it."""
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            # -I: neither the environment nor the current folder decide what the worker imports
            script = [sys.executable, "-I", str(Path(chat_worker.__file__))]
            self._worker = subprocess.Popen(
                [*script, *self._arguments],
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

    def _why_it_ended(self) -> str:
        worker = self._worker
        assert worker is not None  # noqa: S101  # it just answered, badly or not at all
        worker.communicate()
        self._worker = None
        if worker.returncode == -signal.SIGPROF:
            return f"it took more than {float(self._arguments[0]):g} s of CPU time for one text; use a simpler template"
        return "it ended the process that renders it, probably for lack of memory; use a simpler template"


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """Drop keys without a value, and give the reasoning both names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)

"""The usual shapes of fine-tuning rows, all read as one thing: turns, each of them a prompt part or an answer.

messages       {"messages": [{"role": "user", "content": …}, …]}, also ShareGPT's conversations / from / value
instruction    {"instruction": …, "input": …, "output": …}
completion     {"prompt": …, "completion": …}, or any fields put into the user's own two templates
text           {"text": …}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["messages", "instruction", "completion", "text"]
ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_FIELD = re.compile(r"\{(\w+)\}")


class UnusableRowError(Exception):
    """Why a row cannot be trained on; `kind` groups rows of the same fault."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A row as turns; the shape decides what is written around them."""

    shape: Shape
    turns: tuple[Turn, ...]


def read_shape(fields: Mapping[str, Any], templates: tuple[str, str] | None) -> Conversation:
    """Recognize a row's shape; `templates` make prompt and completion of rows with other fields.

    Raises: UnusableRowError.
    """
    if templates is not None:
        prompt, completion = (_fill(template, fields) for template in templates)
        return _answered("completion", prompt, completion)
    for name in ("messages", "conversations"):
        if name in fields:
            return _messages(fields[name], name)
    if "instruction" in fields and "output" in fields:
        instruction, output = _text(fields, "instruction"), _text(fields, "output")
        given = _text(fields, "input") if fields.get("input") is not None else ""
        turns = (Turn("user", instruction), Turn("input", given)) if given.strip() else (Turn("user", instruction),)
        _need_answer(output, "output")
        return Conversation("instruction", (*turns, Turn("assistant", output)))
    if "prompt" in fields and "completion" in fields:
        return _answered("completion", _text(fields, "prompt"), _text(fields, "completion"))
    if "text" in fields:
        text = _text(fields, "text")
        _need_answer(text, "text")
        return Conversation("text", (Turn("assistant", text),))
    raise UnusableRowError(
        "shape",
        "no known shape: messages; instruction and output; prompt and completion; text. The row has "
        f"{', '.join(map(str, fields)) or 'no field'}; give prompt_template and completion_template",
    )


def _answered(shape: Shape, prompt: str, completion: str) -> Conversation:
    _need_answer(completion, "completion")
    return Conversation(shape, (Turn("user", prompt), Turn("assistant", completion)))


def _messages(value: Any, name: str) -> Conversation:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnusableRowError("shape", f"{name} must be a list of messages, got {value!r:.60}")
    turns = tuple(_turn(message, f"{name}[{number}]") for number, message in enumerate(value))
    for number, turn in enumerate(turns):
        if turn.role == "system" and number > 0:
            raise UnusableRowError("role", f"{name}[{number}]: a system message must be the first")
        if turn.role == "assistant":
            _need_answer(turn.content, f"{name}[{number}]")
    if not any(turn.role == "assistant" for turn in turns):
        raise UnusableRowError("masked", f"{name} has no message of the assistant, so nothing would be trained")
    return Conversation("messages", turns)


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise UnusableRowError("shape", f"{place} must be an object with role and content, got {message!r:.60}")
    role = message.get("role", message.get("from"))
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UnusableRowError("role", f"{place}: role must be one of {', '.join(ROLES)}, got {role!r}")
    content = message.get("content", message.get("value"))
    if not isinstance(content, str):
        raise UnusableRowError("shape", f"{place}: content must be text, got {content!r:.60}")
    _check_text(content, place)
    return Turn(role, content)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise UnusableRowError("shape", f"{name} must be text, got {type(value).__name__}")
    _check_text(value, name)
    return value


def _check_text(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableRowError("broken", f"{name} holds a lone surrogate at position {error.start}") from error


def _need_answer(text: str, name: str) -> None:
    if not text.strip():
        raise UnusableRowError("empty_answer", f"{name} is empty, so there is no answer to train")


def _fill(template: str, fields: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise UnusableRowError("shape", f"no field {match[1]!r} for the template; the row has {', '.join(fields)}")
        found = str(fields[match[1]])
        _check_text(found, match[1])
        return found

    return _FIELD.sub(value, template)

"""Split a row into turns: each side's text, the values given to the chat template, and the parts to train on.

The keys of a message are a closed set. A key that would be dropped changes what the model learns, so it is a fault of
the row unless it says nothing (null, an empty list) or the user names it in `ignore_fields`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

RowShape = Literal["messages", "instruction", "completion", "text"]
Role = Literal["system", "user", "assistant", "tool", "input"]

# OpenAI's and Hugging Face's roles, which a chat template knows by these names …
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
# … and ShareGPT's (also LLaMA-Factory's) and Gemma's, which stand for one of them.
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
TRAINED_KEYS = {
    "weight": True,
    "train": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "label": True,
    "masked": False,
}
REASONING = ("reasoning_content", "thinking", "reasoning")
_GIVEN = ("name", "tool_call_id", *REASONING)
_KEYS = frozenset({"role", "from", "content", "value", "tool_calls", "function_call", *_GIVEN, *TRAINED_KEYS})


class UnusableRowError(Exception):
    """Why a row cannot be trained on; `kind` groups rows of the same fault."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Turn:
    """One side's message.

    Attributes:
        role: who says it; "input" is the input of an instruction.
        content: the text, with content parts joined; "" where there is none.
        is_trained: false for what the row marks as read only.
        given: what else a chat template is told: the row's own role and content where they differ, name, tool_calls,
            tool_call_id, reasoning_content, thinking.
    """

    role: str
    content: str
    is_trained: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)

    def as_message(self, *, has_parts: bool = True) -> dict[str, Any]:
        """Return the message that a chat template is given; content parts are joined unless it `has_parts`."""
        message = {"role": self.role, "content": self.content, **self.given}
        if not has_parts and isinstance(message["content"], list | tuple):
            message["content"] = self.content
        return message


@dataclass(frozen=True)
class Conversation:
    """A row as turns; the shape decides what is written around them, a chat template also gets tools and documents."""

    shape: RowShape
    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] | None = None
    documents: tuple[Any, ...] | None = None

    def keys(self) -> frozenset[str]:
        """Return the names of what only a chat template can write: tools, documents, and keys of messages."""
        named = {name for name in ("tools", "documents") if getattr(self, name) is not None}
        return frozenset(named | {key for turn in self.turns for key in turn.given if key not in ("role", "content")})

    def unread_by(self, template: str | None) -> frozenset[str]:
        """Return which of `keys` a chat template does not mention; all of them without a template."""
        unread = {key for key in self.keys() if template is None or key not in template}
        if template is not None and any(name in template for name in REASONING):
            unread -= set(REASONING)  # a template is given reasoning under each of its names
        return frozenset(unread)


def present(fields: Mapping[str, Any], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields with content: neither ignored nor null (tables fill a row's missing columns with null)."""
    return {key: value for key, value in fields.items() if key not in ignored and value is not None}


def is_trained(fields: Mapping[str, Any], place: str) -> bool | None:
    """Return what the row or message says by one of `TRAINED_KEYS`; None if none of them is there.

    Raises: UnusableRowError for a value that is neither true nor false, and for two that contradict each other.
    """
    said = {key: _flag(fields[key], f"{place}{key}") is wanted for key, wanted in TRAINED_KEYS.items() if key in fields}
    if len(set(said.values())) > 1:
        raise UnusableRowError("mask", f"{place}{' and '.join(said)} contradict each other")
    return next(iter(said.values()), None)


def read_turn(message: Any, place: str, ignored: Sequence[str]) -> Turn:
    """Read a message of OpenAI's, Hugging Face's or ShareGPT's making.

    Raises: UnusableRowError naming the key.
    """
    if not isinstance(message, Mapping):
        raise UnusableRowError("shape", f"{place} must be an object with role and content, got {message!r:.60}")
    fields = present(message, ignored)
    refuse_unknown(fields, _KEYS, f"{place}.")
    spelled = fields.get("role", fields.get("from"))
    named = _OTHER_NAMES.get(spelled, spelled) if isinstance(spelled, str) else ""
    if named not in _ROLES:
        raise UnusableRowError("role", f"{place}: role must be one of {', '.join(_ROLES)}, got {spelled!r}")
    role, content = _ROLES[named], fields.get("content", fields.get("value"))
    given: dict[str, Any] = {key: _plain(fields[key], f"{place}.{key}") for key in _GIVEN if key in fields}
    if named != role:
        given["role"] = named
    calls = _calls(fields, place, content if spelled == "function_call" else None)
    if calls:
        given["tool_calls"] = calls
    if spelled == "function_call":
        content = None
    if content is None and not calls:
        raise UnusableRowError("shape", f"{place}: content must be text or a list of text parts, got nothing")
    text = _text_of(content, place)
    if content != text:
        given["content"] = content
    return Turn(role, text, _may_train(fields, role, place), given)


def refuse_unknown(fields: Mapping[str, Any], known: frozenset[str] | set[str], place: str) -> None:
    """Refuse a field that would be dropped.

    Raises: UnusableRowError naming it.
    """
    unknown = [key for key, value in fields.items() if key not in known and value not in ([], {})]
    if unknown:
        raise UnusableRowError(
            "field",
            f"{place}{unknown[0]} is not used, so training would drop it; rename it, or name it in ignore_fields "
            f"(--ignore-fields {','.join(map(str, unknown))})",
        )


def check_text(value: str, name: str) -> None:
    """Refuse text that UTF-8 cannot hold.

    Raises: UnusableRowError.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableRowError("broken", f"{name} holds a lone surrogate at position {error.start}") from error


def _may_train(fields: Mapping[str, Any], role: Role, place: str) -> bool:
    said = is_trained(fields, f"{place}.")
    if said and role != "assistant":
        raise UnusableRowError(
            "mask", f"{place} is marked as trained, but is the {role}'s; only the assistant's messages are trained"
        )
    return said is not False


def _flag(value: Any, name: str) -> bool:
    """Return a mark of a row: true, false, 1, 0, or their spellings in a table."""
    spelled = value.strip().lower() if isinstance(value, str) else value
    if spelled in (True, "true", "1", "1.0"):
        return True
    if spelled in (False, "false", "0", "0.0"):
        return False
    raise UnusableRowError("mask", f"{name} must be true, false, 1 or 0, got {value!r:.60}")


def _text_of(content: Any, place: str) -> str:
    """Return the text of a message's content, the parts of a list joined."""
    parts = content if isinstance(content, list | tuple) else [content or ""]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise UnusableRowError("shape", f"{place}: content must be text or a list of text parts, got {part!r:.60}")
        check_text(text, place)
        texts.append(text)
    return "".join(texts)


def _calls(fields: Mapping[str, Any], place: str, spoken: Any) -> list[Any]:
    """Return the calls of tools: `tool_calls`, OpenAI's older `function_call`, or ShareGPT's turn of that name."""
    found = fields.get("tool_calls", [])
    if not isinstance(found, list | tuple) or not all(isinstance(call, Mapping) for call in found):
        raise UnusableRowError("shape", f"{place}.tool_calls must be a list of objects, got {found!r:.60}")
    calls = [_plain(call, f"{place}.tool_calls") for call in found]
    for function in (fields.get("function_call"), spoken):
        if function is not None:
            function = _parsed(function, f"{place}: function_call")  # noqa: PLW2901 - text or the object itself
            if not isinstance(function, Mapping) or "name" not in function:
                rule = f"{place}: function_call must have name and arguments"
                raise UnusableRowError("shape", f"{rule}, got {function!r:.60}")
            calls.append({"type": "function", "function": dict(function)})
    return calls


def _parsed(value: Any, name: str) -> Any:
    """Return JSON that a row may hold as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnusableRowError("shape", f"{name} must be JSON, got {value!r:.60}") from error


def read_list(value: Any, name: str) -> tuple[Any, ...] | None:
    """Return a list of objects (tools, documents), parsed if it is JSON text; None for an empty one.

    Raises: UnusableRowError.
    """
    found = _parsed(value, name) if not isinstance(value, str) or value.strip() else []
    if not isinstance(found, list | tuple) or not all(isinstance(item, Mapping) for item in found):
        raise UnusableRowError("shape", f"{name} must be a list of objects, got {value!r:.60}")
    return tuple(_plain(item, name) for item in found) or None


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON holds it, its text checked.

    Raises: UnusableRowError for a value that JSON has no type for, such as a date of a parquet file.
    """
    if isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, Mapping):
        return {str(key): _plain(inner, name) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(inner, name) for inner in value]
    elif not isinstance(value, bool | int | float | None):
        raise UnusableRowError("shape", f"{name} must be text, numbers, lists and objects, got {value!r:.60}")
    return value

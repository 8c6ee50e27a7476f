"""The usual shapes of fine-tuning rows, all read as one thing: turns, each of them a prompt part or an answer.

messages       {"messages": [{"role": "user", "content": …}, …]}, also ShareGPT's conversations / from / value
instruction    {"instruction": …, "input": …, "output": …}
completion     {"prompt": …, "completion": …}, or any fields put into the user's own two templates
text           {"text": …}

The fields of each shape are a closed set, so that nothing of a row is dropped in silence. Every shape may carry
one of `TRAINED_KEYS`, such as `weight`, `train`, `masked` or `label` (in Kahneman-Tversky rows, false is an answer to
avoid); messages and instructions also `system`, `tools` and `documents`, and instructions the `history` before them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from entrenar.data.sft.prompt_template import PromptTemplate
from entrenar.data.sft.turns import (
    TRAINED_KEYS,
    Conversation,
    Turn,
    UnusableRowError,
    check_text,
    is_trained,
    present,
    read_list,
    read_turn,
    refuse_unknown,
)

_CONTEXT = {"system", "tools", "documents"}
_FIELDS = {
    "messages": {"messages", *_CONTEXT},
    "conversations": {"conversations", *_CONTEXT},
    "instruction": {"instruction", "input", "output", "history", *_CONTEXT},
    "completion": {"prompt", "completion"},
    "text": {"text"},
}


class RejectedRowError(Exception):
    """The row says of itself that it is not to be trained."""


def read_shape(
    row: Mapping[str, Any], templates: tuple[PromptTemplate, PromptTemplate] | None, ignored: Sequence[str] = ()
) -> Conversation:
    """Recognize a row's shape; `templates` make prompt and completion of rows with other fields.

    Raises:
        UnusableRowError: the row has no known shape, or a fault, or a field that would be dropped.
        RejectedRowError: the row is marked as one not to train.
    """
    fields = present(row, ignored)
    if templates is not None:
        prompt, completion = (template.fill(row) for template in templates)
        return _completion(prompt, completion)
    name = _shape_of(fields)
    refuse_unknown(fields, {*_FIELDS[name], *TRAINED_KEYS}, "")
    if is_trained(fields, "") is False:
        raise RejectedRowError(f"{' and '.join(key for key in TRAINED_KEYS if key in fields)} marks it as not trained")
    if name in ("messages", "conversations"):
        return _messages(fields, name, ignored)
    if name == "instruction":
        return _instruction(fields)
    if name == "completion":
        return _completion(_text(fields, "prompt"), _text(fields, "completion"))
    text = _text(fields, "text")
    _need_answer(text, "text")
    return Conversation("text", (Turn("assistant", text),))


def _shape_of(fields: Mapping[str, Any]) -> str:
    for name in ("messages", "conversations"):
        if name in fields:
            return name
    if "instruction" in fields and "output" in fields:
        return "instruction"
    if "prompt" in fields and "completion" in fields:
        return "completion"
    if "text" in fields:
        return "text"
    raise UnusableRowError(
        "shape",
        "no known shape: messages; instruction and output; prompt and completion; text. The row has "
        f"{', '.join(map(str, fields)) or 'no field'}; give prompt_template and completion_template",
    )


def _completion(prompt: str, completion: str) -> Conversation:
    _need_answer(completion, "completion")
    return Conversation("completion", (Turn("user", prompt), Turn("assistant", completion)))


def _messages(fields: Mapping[str, Any], name: str, ignored: Sequence[str]) -> Conversation:
    value = fields[name]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnusableRowError("shape", f"{name} must be a list of messages, got {value!r:.60}")
    turns = tuple(read_turn(message, f"{name}[{number}]", ignored) for number, message in enumerate(value))
    for number, turn in enumerate(turns):
        if turn.role == "system" and number > 0:
            raise UnusableRowError("role", f"{name}[{number}]: a system message must be the first")
        if turn.role == "assistant" and not turn.given.get("tool_calls"):
            _need_answer(turn.content, f"{name}[{number}]")
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise UnusableRowError("masked", f"{name} has no message of the assistant, so nothing would be trained")
    if not any(turn.is_trained for turn in answers):
        raise RejectedRowError("all answers are marked as not trained")
    if "system" in fields and turns[0].role == "system":
        raise UnusableRowError("role", f"the row has a system field and {name}[0] is a system message; keep one")
    return _with_context(fields, turns)


def _instruction(fields: Mapping[str, Any]) -> Conversation:
    output = _text(fields, "output")
    _need_answer(output, "output")
    given = _text(fields, "input") if "input" in fields else ""
    prompt = (Turn("user", _text(fields, "instruction")), *((Turn("input", given),) if given.strip() else ()))
    history = tuple(_history(fields.get("history", ())))
    if not history and not _CONTEXT & set(fields):
        return Conversation("instruction", (*prompt, Turn("assistant", output)))
    asked = Turn("user", "\n\n".join(turn.content for turn in prompt))
    return _with_context(fields, (*history, asked, Turn("assistant", output)))


def _history(pairs: Any) -> list[Turn]:
    if not isinstance(pairs, list | tuple):
        raise UnusableRowError("shape", f"history must be a list of [instruction, answer] pairs, got {pairs!r:.60}")
    turns = []
    for number, pair in enumerate(pairs):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        if not is_pair:
            raise UnusableRowError("shape", f"history[{number}] must be two texts, got {pair!r:.60}")
        for text in pair:
            check_text(text, f"history[{number}]")
        _need_answer(pair[1], f"history[{number}]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _with_context(fields: Mapping[str, Any], turns: tuple[Turn, ...]) -> Conversation:
    """Return a conversation with the row's system prompt, tools and documents."""
    system = _text(fields, "system") if "system" in fields else ""
    tools, documents = (read_list(fields.get(name, ()), name) for name in ("tools", "documents"))
    return Conversation("messages", (*((Turn("system", system),) if system.strip() else ()), *turns), tools, documents)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise UnusableRowError("shape", f"{name} must be text, got {type(value).__name__}")
    check_text(value, name)
    return value


def _need_answer(text: str, name: str) -> None:
    if not text.strip():
        raise UnusableRowError("empty_answer", f"{name} is empty, so there is no answer to train")

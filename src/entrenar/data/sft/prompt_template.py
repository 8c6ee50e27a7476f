"""Prompts made from a row's fields: "Review: {sentence}", "{answers.text[0]}", "{score:.1f}", "{my question}".

Python's own format strings, with the names of fields as they are in the row: letters of any language, spaces and
dots of a name included. `{a.b}` and `{a[b]}` look into nested objects and lists. A brace that is part of the text is
written twice. What the row does not have, or has as null, is a fault of the row and never an empty place.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entrenar.data.sft.turns import UnusableRowError, check_text

_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]*)\]")


class PromptTemplate:
    """A text with fields in braces."""

    def __init__(self, text: str) -> None:
        """Take the text apart.

        Raises: ValueError for a brace that begins no field, an empty field, and a format that no value can have.
        """
        self._parts = list(_parts(text))
        self.fields = tuple(name for _, name, _ in self._parts if name is not None)

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text with the row's values.

        Raises: UnusableRowError for a value that is missing, null, or does not fit its format.
        """
        return "".join(literal + self._value(row, name, form) for literal, name, form in self._parts)

    def top_fields(self, row: Mapping[str, Any]) -> set[str]:
        """Return which of the row's own fields are used."""
        return {_split(row, name)[0] for name in self.fields}

    def _value(self, row: Mapping[str, Any], name: str | None, form: str) -> str:
        if name is None:
            return ""
        value = _look_up(row, name)
        if value is None:
            raise UnusableRowError("shape", f"field {name!r} of the template is null in this row")
        try:
            text = format(value, form) if form else str(value)
        except (ValueError, TypeError) as error:
            raise UnusableRowError("shape", f"field {name!r} cannot be written as {form!r}: {error}") from error
        check_text(text, name)
        return text


def _parts(text: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield the text before each field, the field's name, and its format; the name is None after the last."""
    for literal, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            yield literal, None, ""
            continue
        if not name.strip() or conversion is not None or "{" in (form or ""):
            raise ValueError(f"{{{name}}} must name a field of the row; write a brace of the text twice: {{{{ or }}}}")
        yield literal, name, form or ""


def _split(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the row's own field that a name begins with, and the rest of the name; the longest that is there."""
    if name in row:
        return name, ""
    cuts = [match.start() for match in _STEP.finditer(name)]
    found = next((cut for cut in reversed(cuts) if name[:cut] in row), cuts[0] if cuts else len(name))
    return name[:found], name[found:]


def _look_up(row: Mapping[str, Any], name: str) -> Any:
    first, rest = _split(row, name)
    if first not in row:
        raise UnusableRowError("shape", f"no field {first!r} for the template; the row has {', '.join(map(str, row))}")
    value, seen = row[first], first
    while rest:
        match = _STEP.match(rest)
        key = (match[1] if match[1] is not None else match[2]) if match else rest
        value, seen, rest = _step(value, key, seen), f"{seen}.{key}", rest[match.end() :] if match else ""
    return value


def _step(value: Any, key: str, seen: str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, Sequence) and not isinstance(value, str) and key.isdecimal() and int(key) < len(value):
        return value[int(key)]
    raise UnusableRowError("shape", f"{seen} has no {key!r} for the template, it is {value!r:.60}")

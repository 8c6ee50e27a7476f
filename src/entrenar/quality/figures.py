"""A number in a JSON file of results: found by its place, held against a bound."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError, NotMeasured
from entrenar.files import read_json


def figures(place: Path, at: str) -> list[float]:
    """Return the numbers at a dotted place of a JSON file; `*` is every key or item, and true counts as 1.

    Raises: NotMeasured if the file or the place is not there; FormatError if it holds no number.
    """
    try:
        table = read_json(place)
    except FileNotFoundError as missing:
        raise NotMeasured(f"{place} is missing: what it should hold was not measured") from missing
    found = list(_walk(table, at.split("."), f"{place}: {at}"))
    if not found:
        raise NotMeasured(f"{place} has nothing at {at}: it was not measured")
    return found


def _walk(value: Any, keys: list[str], what: str) -> Iterator[float]:
    if not keys:
        if not isinstance(value, (bool, int, float)):
            raise FormatError(f"{what} must be a number, is {value!r}")
        yield float(value)
    elif keys[0] == "*" and isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _walk(item, keys[1:], what)
    elif isinstance(value, dict) and keys[0] in value:
        yield from _walk(value[keys[0]], keys[1:], what)
    elif isinstance(value, list) and keys[0].lstrip("-").isdigit() and -len(value) <= int(keys[0]) < len(value):
        yield from _walk(value[int(keys[0])], keys[1:], what)


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Return each number over the only one below, or over its own.

    Raises: FormatError if they do not pair up, or a divisor is zero.
    """
    divisors = below * len(above) if len(below) == 1 else below
    if len(divisors) != len(above) or not all(divisors):
        raise FormatError(f"{len(above)} numbers cannot be divided by {divisors}")
    return [one / other for one, other in zip(above, divisors, strict=True)]

"""Small stories from a grammar of our own: text that a small model learns in minutes, with a known best possible loss.

A plot is a list of beats, a beat one of several sentences, and words are drawn where they are first mentioned and kept
from then on, so a story asks a model for what real text asks: agreement, quotes, arithmetic, and memory of who owns
what over many sentences. Every draw is uniform, so a story that took draws among n₁, n₂, … options has probability
1/(n₁·n₂·…), and costs Σ log₂ nᵢ bits: no model can spend fewer bits on average (Shannon 1948, theorem 9). That holds
exactly where a story can be told in one way only, which `derivations` counts.
"""

import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_SLOT = re.compile(r"\{([a-z]+)(?:#(\d))?(?::([A-Za-z]+))?\}")
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven")
_PRONOUNS = {
    "she": {"he": "she", "his": "her", "him": "her", "person": "a girl"},
    "he": {"he": "he", "his": "his", "him": "him", "person": "a boy"},
}
_PEOPLE = ("hero", "friend")
_SAMPLE = 2000
_NUMBERS = ("many", "given", "left")

Choose = Callable[[int], int]
"""Returns one of 0 … n-1."""


@dataclass(frozen=True)
class Story:
    """A story, and the bits that its draws took: -log₂ of its probability."""

    text: str
    bits: float


@dataclass(frozen=True)
class Check:
    """Figures of written stories, each a share of all stories.

    Attributes:
        keeps_characters: no third person, second animal, thing or color turns up.
        is_flawless: the grammar can tell exactly this story, with every pronoun, number and promise right.
    """

    keeps_characters: float
    is_flawless: float


@cache
def _grammar() -> dict[str, Any]:
    return tomllib.loads(resources.files("entrenar.data").joinpath("stories.toml").read_text(encoding="utf-8"))


def stories(count: int, seed: int) -> Iterator[Story]:
    """Yield `count` stories; equal seeds give equal stories."""
    drawn = random.Random(seed)  # noqa: S311 - stories, not secrets
    for _ in range(count):
        bits = 0.0

        def choose(options: int) -> int:
            nonlocal bits
            bits += math.log2(options)
            return drawn.randrange(options)

        text = "".join(_tell(choose))
        yield Story(text, bits)


def derivations(text: str) -> int:
    """Return in how many ways the grammar tells exactly `text`: 0 for a flawed story, 1 for a story."""
    found, open_ends = 0, [[]]  # type: tuple[int, list[list[int]]]
    while open_ends:
        script = open_ends.pop()
        options, told = _follow(script, text)
        if options is None:
            found += told == text
        else:
            open_ends += [[*script, option] for option in range(options)]
    return found


def check(texts: Sequence[str]) -> Check:
    """Judge written stories.

    Raises: ValueError for no story.
    """
    if not texts:
        raise ValueError("check needs at least one story, got none")
    kept = sum(keeps_characters(text) for text in texts)
    return Check(kept / len(texts), sum(derivations(text) > 0 for text in texts) / len(texts))


def keeps_characters(text: str) -> bool:
    """Return whether people, animal, thing and color stay the same throughout, in the grammar's own words."""
    grammar = _grammar()
    words = re.findall(r"[A-Za-z]+", text)
    if not set(words) <= _vocabulary():
        return False
    names = set(words) & {*grammar["girls"], *grammar["boys"]}
    lists = [grammar["words"][kind] for kind in ("animal", "thing", "color")]
    return 1 <= len(names) <= 2 and all(len(set(words) & set(kinds)) <= 1 for kinds in lists)


@cache
def _vocabulary() -> frozenset[str]:
    """Return the words of a sample of stories, four times as large as one that holds every word."""
    return frozenset(word for story in stories(_SAMPLE, 0) for word in re.findall(r"[A-Za-z]+", story.text))


class _NeedChoiceError(Exception):
    """The script has ended before the story has."""


def _follow(script: Sequence[int], text: str) -> tuple[int | None, str]:
    """Follow a script; return the number of options at its end (0 if `text` is left), or None if the story ends."""
    left = list(reversed(script))
    told = ""
    asked = 0

    def choose(options: int) -> int:
        nonlocal asked
        if not left:
            asked = options
            raise _NeedChoiceError
        return left.pop()

    try:
        for piece in _tell(choose):
            told += piece
            if not text.startswith(told):
                return 0, told
    except _NeedChoiceError:
        return asked, told
    return None, told


def _tell(choose: Choose) -> Iterator[str]:
    """Yield a story in pieces, each as soon as its draws are made."""
    grammar = _grammar()
    plot = grammar["plot"][choose(len(grammar["plot"]))]
    known: dict[str, str] = {}
    for number, beat in enumerate(plot["beats"]):
        sentence = beat[choose(len(beat))]
        if number:
            yield " "
        start = 0
        for slot in _SLOT.finditer(sentence):
            yield sentence[start : slot.start()]
            yield _fill(slot[1], slot[2] or "", slot[3] or "", known, choose)
            start = slot.end()
        yield sentence[start:]


def _fill(kind: str, number: str, form: str, known: dict[str, str], choose: Choose) -> str:
    """Return the word of a slot, drawn if it is the first of its kind, in the form that is asked for."""
    if kind in _PEOPLE:
        return _person(kind, form, known, choose)
    if kind in _NUMBERS:
        return _number(kind, form, known, choose)
    slot = kind + number
    if slot not in known:
        taken = {word for other, word in known.items() if other.rstrip("123456789") == kind}
        free = [word for word in _grammar()["words"][kind] if word not in taken]
        known[slot] = free[choose(len(free))]
    return _formed(known[slot], form, known)


def _person(kind: str, form: str, known: dict[str, str], choose: Choose) -> str:
    grammar = _grammar()
    if kind not in known:
        taken = {known.get(person) for person in _PEOPLE}
        free = [name for name in (*grammar["girls"], *grammar["boys"]) if name not in taken]
        known[kind] = free[choose(len(free))]
    name = known[kind]
    if not form:
        return name
    word = _PRONOUNS["she" if name in grammar["girls"] else "he"][form.lower()]
    return word.capitalize() if form[0].isupper() else word


def _number(kind: str, form: str, known: dict[str, str], choose: Choose) -> str:
    """Return many, given or left: given of many are given away, one at least is left."""
    if "many" not in known:
        counts: list[str] = _grammar()["many"]
        known["many"] = counts[choose(len(counts))]
    many = _COUNTS.index(known["many"]) + 1
    if kind != "many" and "given" not in known:
        given = 1 + choose(many - 1)
        known["given"], known["left"] = _COUNTS[given - 1], _COUNTS[many - given - 1]
    if form == "was":
        return "was" if known["left"] == "one" else "were"
    return known[kind]


def _formed(word: str, form: str, known: dict[str, str]) -> str:
    """Return a word with its article, or in the plural that a number asks for; words of a building bring their own."""
    if form in ("a", "A"):
        return f"{form}{'n' if word[0] in 'aeiou' else ''} {word}"
    if form == "the":
        return f"the {word.partition(' ')[2]}"
    if form == "s" or (form.startswith("of") and known[form.removeprefix("of")] != "one"):
        return f"{word}s"
    return word

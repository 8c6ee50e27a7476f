"""`data.stories`: the stories follow their grammar, their cost in bits is exact, and slips are found."""

import math
import re
from itertools import islice

import pytest

from entrenar.data import stories

SOME = list(stories.stories(150, seed=7))
TINY = {
    "girls": ["Ann"],
    "boys": ["Bob", "Cal"],
    "many": ["two", "three"],
    "words": {"color": ["red", "blue"]},
    "plot": [
        {"beats": [["{hero} is {color}.", "{color:A} hat on {hero:him}, {hero}."], ["{friend} left {hero:his} hat."]]},
        {"beats": [["{many} minus {given} is {left}."]]},
    ],
}  # fmt: skip


def test_equal_seeds_tell_equal_stories():
    """The corpus of a quickstart is the same on every machine."""
    assert [story.text for story in stories.stories(150, seed=7)] == [story.text for story in SOME]
    assert len({story.text for story in SOME}) == len(SOME)


def test_a_story_is_told_in_one_way_only():
    """So that the bits of its draws are the information in its text, and no model can need fewer."""
    assert {stories.derivations(story.text) for story in SOME} == {1}


@pytest.fixture
def tiny(monkeypatch):
    """A grammar small enough to be told completely."""
    monkeypatch.setattr(stories, "_grammar", lambda: TINY)


def test_probabilities_of_all_stories_add_up_to_one(tiny):
    """2^-bits is a probability: over every story of a grammar it sums to 1."""
    told = {story.text: story.bits for story in stories.stories(3000, seed=0)}
    assert math.fsum(2**-bits for bits in told.values()) == pytest.approx(1, abs=1e-12)
    assert "two minus one is one." in told
    assert "A red hat on her, Ann. Bob left her hat." in told
    assert all(stories.derivations(text) == 1 for text in told)


@pytest.mark.parametrize(
    ("old", "new"),
    [(r"\.", "!"), (r"\b([Ss])he\b|\b([Hh])e\b", "they"), (r"$", " The end."), (r"^.", "")],
    ids=["another mark", "another pronoun", "more at the end", "less at the beginning"],
)
def test_a_slip_is_found(old, new):
    """A text that differs from every story is none."""
    changed = [re.sub(old, new, story.text, count=1) for story in SOME]
    flawed = [text for text, story in zip(changed, SOME, strict=True) if text != story.text]
    assert len(flawed) > 20
    assert not any(stories.derivations(text) for text in islice(flawed, 40))


def test_apples_are_counted():
    """Given and left add up to many, wherever a story counts."""
    numbers = ("one", "two", "three", "four", "five", "six")
    counted = [story.text for story in stories.stories(400, seed=1) if "basket" in story.text]
    assert counted
    for text in counted:
        found = re.findall(rf"\b({'|'.join(numbers)})\b", text)[:3]
        many, given, left = (numbers.index(word) + 1 for word in found)
        assert many == given + left, text


@pytest.mark.parametrize(
    "change",
    [("Hugo heard", "Ben and Hugo heard"), ("the kite", "the drum and the kite"), ("red", "blue and red")],
    ids=["a third person", "a second thing", "a second color"],
)
def test_a_story_that_mixes_up_its_characters_is_told_apart(change):
    """Names, things and colors that turn up from nowhere are seen; a consistent story passes."""
    text = "Ella had a red kite. Hugo heard her and came running. At last Hugo found the kite in the tall grass."
    assert stories.keeps_characters(text)
    assert not stories.keeps_characters(text.replace(*change))


def test_a_text_without_people_keeps_no_characters():
    """Noise is no story."""
    assert not stories.keeps_characters("the the . and kite")


def test_shares_are_those_of_the_texts():
    """One story and one broken one make a half."""
    good = SOME[0].text
    assert stories.check([good, "no story"]) == stories.Check(keeps_characters=0.5, is_flawless=0.5)
    with pytest.raises(ValueError, match="check needs at least one story, got none"):
        stories.check([])

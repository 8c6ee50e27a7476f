"""A list of tokens that no tokenizer can have is refused; merges that lead in circles end."""

import dataclasses

import pytest

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.vocabulary import CONTROL, NORMAL, UNKNOWN, Vocabulary, tokenizer_files
from entrenar.errors import FormatError

PIECES = Vocabulary(
    tokens=["<unk>", "<s>", "</s>", "a"], scores=[0.0] * 4, kinds=[UNKNOWN, CONTROL, CONTROL, NORMAL], merges=[],
    pattern=None, bos_id=1, eos_id=2, pad_id=None, unk_id=0, add_bos=True, add_eos=False, adds_space=True,
    chat_template=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": [0.0]},
            r"^place: the vocabulary must have as many scores and kinds as tokens, and some, got 4",
        ),
        ({"bos_id": 4}, r"^place: bos_id is 4, but there are 4 tokens$"),
        ({"eos_id": -1}, r"^place: eos_id is -1, but"),
        ({"unk_id": 3}, r"^place: the unknown token is 3, .* of another kind$"),
        ({"tokens": ["a"] * 4}, r"^place: token 1 repeats token 0, 'a'$"),
        ({"scores": [float("nan")] * 4}, r"^place: token 0 must have text and a score, got '<unk>' and nan$"),
    ],
)
def test_an_impossible_vocabulary_is_refused(change, message):
    """Place and field."""
    vocabulary = dataclasses.replace(PIECES, **change)
    with pytest.raises(FormatError, match=message):
        tokenizer_files(vocabulary, "place")


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        (["a", "b", "ab", "ba", "aba"], [["a", "ba"], ["ab", "a"], ["a", "b"], ["b", "a"]]),
        (["a", "b", "aa"], [["a", "a"], ["a", "a"]]),
        (["a", "b", ""], [["a", ""], ["", "b"]]),
    ],
)
def test_cyclic_merges_come_to_an_end(vocab, merges):
    """Merges that lead to each other, twice to the same or to nothing new: encoding ends, and decodes to the text."""
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {token: index for index, token in enumerate(vocab)}, "merges": merges}
    tokenizer = Tokenizer({"version": "1.0", "model": model, "added_tokens": [], "decoder": decoder})
    found = tokenizer.encode("ababab")
    assert tokenizer.decode(found) == "ababab"
    assert len(found) <= 6

"""A tokenizer restated as tokens, scores and merges merges as before."""

import dataclasses

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer, train_bpe
from entrenar.data.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, tokenizer_files, vocabulary_of
from entrenar.errors import FormatError


def again(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(*tokenizer_files(vocabulary_of(tokenizer), "place"))


@pytest.fixture(scope="module")
def pairs(shared_data):
    """Tokenizers of both families and their restatements."""
    originals = [
        Tokenizer.load(shared_data / "tokenizers/llama2_hf"),
        Tokenizer.load(shared_data / "tokenizers/llama3_style_small/torchtitan_tokenizer.json"),
        train_bpe(["def f(x):\n    return x\n", "naïve don't 漢字 🙂 1234"] * 10, 380),
    ]
    return [(original, again(original)) for original in originals]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text(st.sampled_from("the ing\n\t  é漢🙂1▁<s>"), max_size=80))
def test_ids_stay(pairs, text):
    """Every string has the ids it had."""
    for original, restated in pairs:
        assert restated.encode(text) == original.encode(text)


def test_control_tokens_keep_their_ids(pairs, tmp_path):
    """Before the vocabulary or behind it, for us and for who reads the saved file: no text shows where they are."""
    for original, restated in pairs:
        restated.save(tmp_path)
        saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for token in original.content["added_tokens"]:
            assert restated.id_of(token["content"]) == saved.token_to_id(token["content"]) == token["id"]
        assert Tokenizer.load(tmp_path).hash == restated.hash


def test_a_tokenizer_made_here_stays_the_same_to_a_corpus(pairs):
    """A corpus knows its tokenizer by the hash: a model that went through another format still fits it."""
    original, restated = pairs[2]
    assert restated.hash == original.hash


def test_kinds_and_scores_of_llama2(shared_data):
    """As sentencepiece has them; scores fall as the original's do."""
    vocabulary = vocabulary_of(Tokenizer.load(shared_data / "tokenizers/llama2/tokenizer.model"))
    assert vocabulary.kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert vocabulary.kinds[258:260] == [BYTE, NORMAL]
    assert vocabulary.family == "pieces"
    merged = [vocabulary.scores[index] for index in range(260, 1000) if len(vocabulary.tokens[index].strip("▁")) > 1]
    assert merged == sorted(merged, reverse=True)


def test_a_pattern_without_a_name_is_refused():
    """The other formats could not cut words that way."""
    tokenizer = train_bpe(["some text"] * 5, 260)
    content = dict(tokenizer.content)
    content["pre_tokenizer"] = {
        **content["pre_tokenizer"],
        "pretokenizers": content["pre_tokenizer"]["pretokenizers"][1:],
    }
    with pytest.raises(FormatError, match=r"pre_tokenizer cuts words neither as LLaMA 3 nor as GPT-2 does"):
        vocabulary_of(Tokenizer(content, tokenizer.config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": [0.0]},
            r"^place: the vocabulary must have as many scores and kinds as tokens, and some, got 32000",
        ),
        ({"bos_id": 32000}, r"^place: bos_id is 32000, but there are 32000 tokens$"),
        ({"eos_id": -1}, r"^place: eos_id is -1, but"),
        ({"unk_id": 500}, r"^place: the unknown token is 500, .* of another kind$"),
        ({"tokens": ["a"] * 32000}, r"^place: token 1 repeats token 0, 'a'$"),
        ({"scores": [float("nan")] * 32000}, r"^place: token 0 must have text and a score, got '<unk>' and nan$"),
    ],
)
def test_an_impossible_vocabulary_is_refused(pairs, change, message):
    """Place and field."""
    vocabulary = dataclasses.replace(vocabulary_of(pairs[0][0]), **change)
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

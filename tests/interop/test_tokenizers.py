"""A tokenizer restated as tokens, scores and merges merges as before, and llama2.c's file is the published one."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer, train_bpe
from entrenar.data.tokenizer.llama2c import read_tokens
from entrenar.data.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, tokenizer_files
from entrenar.errors import FormatError
from entrenar.interop.tokenizers import tokenizer_bin, vocabulary_of

TEXTS = ["hello world", "Once upon a time,", "a  b", "naïve 漢字 🙂", "\n\n\t", "", "x" * 40, "Ünïcödé 123 4567"]


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
    with pytest.raises(FormatError, match=r"pre_tokenizer cuts words like none of llama3"):
        vocabulary_of(Tokenizer(content, tokenizer.config))


@pytest.mark.parametrize("source", ["tokenizers/tok512/tok512.bin", "tokenizers/llama2/tokenizer.bin"])
def test_what_is_written_equals_what_was_published(shared_data, tmp_path, source):
    """Tokens byte for byte, and the length of the longest."""
    path = shared_data / source
    tokenizer = Tokenizer.load(path)
    target = tmp_path / "tokenizer.bin"
    target.write_bytes(tokenizer_bin(tokenizer, tokenizer.vocab_size))
    assert [token for _, token in read_tokens(target)] == [token for _, token in read_tokens(path)]
    assert target.read_bytes()[:4] == path.read_bytes()[:4]


def test_a_written_file_reads_back_with_the_same_ids(shared_data, tmp_path):
    """Scores that were derived from merges merge in the order of the original ones."""
    model = Tokenizer.load(shared_data / "tokenizers/llama2_hf")
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer_bin(model, 32003))
    back = Tokenizer.load(tmp_path)
    assert back.vocab_size == 32003
    assert [back.encode(text) for text in TEXTS] == [model.encode(text) for text in TEXTS]


def test_a_byte_level_tokenizer_is_refused_with_the_way_out(shared_data):
    """llama2.c's program could not encode with it."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers/llama3_style_small/tiktoken_small.model")
    with pytest.raises(FormatError, match=r"^llama2\.c reads sentencepiece tokenizers .* convert to gguf, or leave"):
        tokenizer_bin(tokenizer, 2000)

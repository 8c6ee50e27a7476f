"""`entrenar.data.tokenizer.train_bpe`: byte-level BPE, deterministic, with a token for every byte."""

import subprocess
import sys

import pytest

from entrenar.data import train_bpe
from entrenar.errors import ConfigError, DataError

TEXTS = ["def f(x):\n    return x + 12345\n", "the cat sat on the mat, the cat sat\n"] * 3


def test_training_is_deterministic_across_processes():
    """Equal texts give an equal tokenizer, in a process with another hash seed and thread count too."""
    code = f"from entrenar.data import train_bpe; print(train_bpe({TEXTS!r}, 300).hash)"
    expected = train_bpe(TEXTS, 300).hash
    environment = {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
    assert train_bpe(TEXTS, 300).hash == expected


def test_every_byte_has_a_token():
    """All 256 bytes are in the vocabulary, though the text holds few of them."""
    tokenizer = train_bpe(["a"], 259)
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 259)


def test_words_are_cut_for_code():
    """An indentation is apart from the word after it, and numbers are cut into threes."""
    tokenizer = train_bpe(["\n        return 123456\n"] * 50, 320)
    pieces = [tokenizer.token_bytes[index] for index in tokenizer.encode("\n        return 123456\n")]
    assert pieces == [b"\n", b"       ", b" return", b" ", b"123", b"456", b"\n"]


def test_merges_shorten_frequent_words():
    """The tokens of the training text are fewer than its bytes, and more merges give fewer tokens."""
    lengths = [len(train_bpe(TEXTS, size).encode(TEXTS[1])) for size in (259, 270, 290)]
    assert lengths[0] == len(TEXTS[1])
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    """The message gives the least size."""
    with pytest.raises(ConfigError, match=r"vocab_size must be at least 259 .* got 258"):
        train_bpe(["a"], 258)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_refused(texts: list[str]):
    """Empty sources raise DataError, not a tokenizer of nothing."""
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_bpe(texts, 300)

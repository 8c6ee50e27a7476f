"""`entrenar.data.tokenizer.token_bytes`: tokens are bytes; text streams out of them by whole characters."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.token_bytes import byte_alphabet, decoder_family
from entrenar.errors import DataError, FormatError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def test_byte_alphabet_is_the_one_of_tokenizers():
    """256 different characters, the same set as the library's."""
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert alphabet["Ġ"] == ord(" ")
    assert alphabet["Ċ"] == ord("\n")


@pytest.mark.property
@pytest.mark.kills(
    "data.tokenizer.token_bytes",
    "return self._utf8.decode(self._bytes(token_id))",
    'return self._bytes(token_id).decode("utf-8", "replace")',
)
@given(TEXT)
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer, text: str):
    """Each piece is a whole prefix of the text, and together they are the text."""
    stream = tokenizer.decode_stream()
    shown = ""
    for index in tokenizer.encode(text):
        shown += stream.push(index)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@pytest.mark.property
@pytest.mark.kills(
    "data.tokenizer.token_bytes",
    "return self._utf8.decode(self._bytes(token_id))",
    'return self._bytes(token_id).decode("utf-8", "replace")',
)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_stream_equals_decode_for_any_ids(tokenizer: Tokenizer, ids: list[int]):
    """Also for ids that no text gives: broken characters, control tokens."""
    stream = tokenizer.decode_stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_an_unfinished_character_is_held_back_and_then_marked(tokenizer: Tokenizer):
    """Nothing comes of the first bytes of an emoji; at the end they become one U+FFFD."""
    ids = tokenizer.encode("a😀")
    stream = tokenizer.decode_stream()
    assert [stream.push(index) for index in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_context_is_not_repeated(tokenizer: Tokenizer):
    """A stream that continues a prompt gives only what follows, though a character began in the prompt."""
    ids = tokenizer.encode("hé there")
    stream = tokenizer.decode_stream(ids[:2])
    assert "".join(map(stream.push, ids[2:])) + stream.finish() == "é there"


def test_stream_refuses_unknown_ids(tokenizer: Tokenizer):
    """The message names the id."""
    with pytest.raises(DataError, match="token id 300 is outside"):
        tokenizer.decode_stream().push(300)


def test_control_tokens_are_skipped_unless_asked_for(tokenizer: Tokenizer):
    """Both ways of decoding them."""
    assert tokenizer.decode_stream().push(tokenizer.eos_id) == ""
    assert tokenizer.decode_stream(skip_special=False).push(tokenizer.eos_id) == "<|eos|>"


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ({"type": "ByteLevel"}, ("bytes", False)),
        ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}, ("pieces", False)),
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "Strip", "start": 1}]}, ("pieces", True)),
        ({"type": "Metaspace", "prepend_scheme": "always"}, ("pieces", True)),
        ({"type": "Metaspace", "prepend_scheme": "never"}, ("pieces", False)),
    ],
)
def test_decoder_families(decoder: dict[str, object], expected: tuple[str, bool]):
    """Each decoder of the LLaMA world is recognized, with its leading space."""
    assert decoder_family(decoder, "file") == expected


def test_foreign_decoders_are_refused():
    """A WordPiece decoder is no LLaMA's; the message says what would be."""
    with pytest.raises(FormatError, match=r"file: decoder must be ByteLevel or .* got \['WordPiece'\]"):
        decoder_family({"type": "WordPiece"}, "file")

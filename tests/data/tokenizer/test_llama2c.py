"""llama2.c's tokenizer.bin: same ids as the sentencepiece model it was made from; damage is named."""

import struct

import pytest

from entrenar.data import Tokenizer
from entrenar.errors import FormatError

TEXTS = ["hello world", "Once upon a time,", "a  b", "naïve 漢字 🙂", "\n\n\t", "", "x" * 40, "Ünïcödé 123 4567"]


def test_llama2_bin_gives_the_ids_of_the_model(shared_data):
    """tokenizer.bin and tokenizer.model of LLaMA 2 are one tokenizer."""
    ours = Tokenizer.load(shared_data / "tokenizers/llama2/tokenizer.bin")
    model = Tokenizer.load(shared_data / "tokenizers/llama2/tokenizer.model")
    assert [ours.encode(text, bos=True) for text in TEXTS] == [model.encode(text, bos=True) for text in TEXTS]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)


def test_tok512_bin_keeps_runs_of_spaces(shared_data):
    """The model collapses spaces before encoding; the .bin, like llama2.c's program, has no such rule."""
    ours = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    model = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.model")
    single = [text for text in TEXTS if text == " ".join(text.split())]
    assert [ours.encode(text) for text in single] == [model.encode(text) for text in single]
    assert ours.encode("a  b") != model.encode("a  b")


def bin_of(*tokens: bytes, longest: int = 16) -> bytes:
    return struct.pack("<I", longest) + b"".join(struct.pack("<fi", 0.0, len(token)) + token for token in tokens)


PLAIN = [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc", r"is no tokenizer\.bin: it has 3 bytes$"),
        (struct.pack("<I", 9), r"the vocabulary must have as many scores and kinds as tokens, and some, got 0 tokens"),
        (bin_of(*PLAIN)[:-1], r"token 3 claims 1 bytes, of 16 at most and 0 left$"),
        (bin_of(*PLAIN)[:-7], r"ends in the middle of token 3$"),
        (bin_of(*PLAIN) + struct.pack("<fi", 0, -5), r"token 4 claims -5 bytes, of 16 at most and 0 left$"),
        (bin_of(*PLAIN) + struct.pack("<fi", 0, 1 << 30), r"token 4 claims 1073741824 bytes"),
        (bin_of(*PLAIN, b"\xff\xfe"), r"token 4 is not UTF-8: b'\\xff\\xfe'$"),
        (bin_of(*PLAIN, b"a"), r"token 4 repeats token 3, 'a'$"),
        (bin_of(*PLAIN, b""), r"token 4 must have text and a score, got '' and 0\.0$"),
        (bin_of(*PLAIN[:1]), r"bos_id is 1, but there are 1 tokens$"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, data, message):
    """File and token."""
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"tokenizer\.bin(:|) " + message):
        Tokenizer.load(path)

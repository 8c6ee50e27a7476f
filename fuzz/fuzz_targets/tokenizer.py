"""Fuzz the tokenizer: every text comes back, no id is out of range, and text that looks like a control token is text.

    python fuzz/fuzz_targets/tokenizer.py -runs=1000000 -len_control=0 -dict=fuzz/fuzz_targets/tokenizer.dict

`--planted` reads control tokens from text, as an injection would: the fuzzer must find that.
"""

import sys

import atheris

with atheris.instrument_imports(include=["entrenar.data"]):
    from entrenar.data.tokenizer.train_bpe import train_bpe

TEXTS = ["the cat sat on the mat", "größer 😀👩‍👩‍👧 שלום", "def f(x):\n\treturn x\n", "á \u200d \x00 end"]
PLANTED = "--planted" in sys.argv
TOKENIZER = train_bpe(TEXTS * 4, 300)
CONTROL = {TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id}


def check(data: bytes) -> None:
    """Encode a text and bring it back."""
    text = atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(len(data))
    ids = TOKENIZER.encode(text, allow_special=PLANTED)
    assert all(0 <= index < TOKENIZER.vocab_size for index in ids), (text, ids)
    assert not CONTROL.intersection(ids), f"text became a control token: {text!r}"
    stream = TOKENIZER.decode_stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.finish() == text, (text, pieces)


atheris.Setup([word for word in sys.argv if word != "--planted"], check)
atheris.Fuzz()

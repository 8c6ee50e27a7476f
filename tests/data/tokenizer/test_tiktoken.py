"""LLaMA 3's rank files: the published ids, the published rule, damage named by its line."""

import base64
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.tiktoken import is_tiktoken, llama3_control_tokens, read_tiktoken
from entrenar.data.tokenizer.vocabulary import LLAMA3_PATTERN
from entrenar.errors import FormatError

regex = pytest.importorskip("regex")


def write_ranks(path, extra=()):
    tokens = [bytes([byte]) for byte in range(256)] + list(extra)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def reference_ids(ranks: dict[bytes, int], text: str) -> list[int]:
    """The rule as tiktoken states it: of all adjacent pairs, join the one whose token has the lowest rank."""
    ids = []
    for word in regex.findall(LLAMA3_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            ids.append(ranks[word.encode()])
            continue
        while True:
            joined = [(ranks.get(a + b, 1 << 30), at) for at, (a, b) in enumerate(pairwise(parts))]
            if not joined or min(joined)[0] == 1 << 30:
                break
            at = min(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def published(shared_data):
    path = shared_data / "tokenizers" / "llama3_style_small" / "tiktoken_small.model"
    ranks = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    return Tokenizer.load(path), {token: rank for rank, token in enumerate(ranks)}


def test_published_ids(shared_data, published):
    """The ids that torchtune publishes for its small file."""
    vectors = shared_data / "tokenizers" / "llama3_style_small" / "tiktoken_small.vectors.json"
    for case in json.loads(vectors.read_text())["cases"]:
        assert published[0].encode(case["text"]) == case["ids"]
        assert published[0].decode(case["ids"]) == case["text"]


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("the insco aeAE'tll 0123\n\té漢🙂."), max_size=60))
def test_ids_follow_the_rule(published, text):
    """Every string has the ids that the rule of lowest rank gives it."""
    tokenizer, ranks = published
    assert tokenizer.encode(text) == reference_ids(ranks, text)


def test_control_tokens_of_llama3():
    """256 of them; the ones that chat uses have Meta's ids behind 128,000 ranks."""
    names = llama3_control_tokens()
    assert len(names) == len(set(names)) == 256
    assert {name: names.index(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")} == {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eot_id|>": 9,
    }  # fmt: skip
    assert names[6:8] == ["<|start_header_id|>", "<|end_header_id|>"]
    assert names[-1] == "<|reserved_special_token_246|>"


def test_control_tokens_stand_behind_the_last_rank(tmp_path):
    """They are read as control tokens when asked, and begin a text."""
    path = write_ranks(tmp_path / "tokenizer.model", [b"ab"])
    content, config = read_tiktoken(path, ["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer = Tokenizer(content, config)
    assert tokenizer.encode("ab<|end_of_text|>", bos=True, allow_special=True) == [257, 256, 258]
    assert tokenizer.eos_id == 258


def test_a_sentencepiece_model_is_no_rank_file(shared_data):
    """Both are named tokenizer.model; the first line tells them apart."""
    assert not is_tiktoken(shared_data / "tokenizers" / "llama2" / "tokenizer.model")
    assert is_tiktoken(shared_data / "tokenizers" / "llama3_style_small" / "tiktoken_small.model")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"!!!! 256", r"line 257: must be base64 and a rank, got b'!!!! 256'$"),
        (b"YWI= x", r"line 257: must be base64 and a rank"),
        (b"YWI=", r"line 257: must be base64 and a rank"),
        (b"YWI= 300", r"line 257: ranks must count up from 0, expected 256, got 300$"),
        (b"AA== 256", r"line 257: token b'\\x00' is on line 1 too$"),
        (base64.b64encode(bytes(5000)) + b" 256", r"line 257: a token has 1 to 4096 bytes, got 5000$"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    """File and line."""
    path = write_ranks(tmp_path / "tokenizer.model")
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(FormatError, match=r"tokenizer\.model, " + message):
        read_tiktoken(path)


def test_a_file_without_all_bytes_is_refused(tmp_path):
    """Some text could not be encoded."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"AA== 0\n")
    with pytest.raises(FormatError, match=r"tokenizer\.model: 255 single bytes have no token, 0x01 first$"):
        read_tiktoken(path)

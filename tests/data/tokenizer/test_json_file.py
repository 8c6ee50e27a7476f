"""`entrenar.data.tokenizer.json_file`: a damaged or hostile tokenizer.json is refused by file and field."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from entrenar.data import Tokenizer
from entrenar.errors import EntrenarError, FormatError


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def _change(folder: Path, path: str, value: Any) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", None, "model must be an object, got NoneType"),
        ("model.type", "Unigram", "model.type must be BPE, got 'Unigram'"),
        ("model.dropout", 0.1, "model.dropout must be null, got 0.1: encoding would be random"),
        ("model.vocab", [], "model.vocab must be an object, got list"),
        ("model.vocab", {}, "model.vocab is empty"),
        ("model.vocab", {"a": "1"}, "model.vocab['a'] must be a token id, got '1'"),
        ("model.vocab", {"a": -1}, "model.vocab['a'] must be a token id, got -1"),
        ("model.vocab", {"a": True}, "model.vocab['a'] must be a token id, got True"),
        ("model.vocab", {"a": 1, "b": 1}, "model.vocab['b'] has id 1, which 'a' has too"),
        ("model.vocab", {"a": 2_000_000_000}, "has 1 tokens but an id as high as 2000000000"),
        ("model.merges", {}, "model.merges must be a list, got dict"),
        ("model.merges.0", "a b c", "model.merges[0] must be two tokens, got 'a b c'"),
        ("model.merges.0", 7, "model.merges[0] must be two tokens, got 7"),
        ("model.merges.0", ["a", 7], "model.merges[0] must be two tokens"),
        ("model.merges.1", ["z", "nothere"], "model.merges[1] is ['z', 'nothere'], but a part or the whole"),
        ("model.vocab.<|", 300, None),
        ("added_tokens", {}, "added_tokens must be a list, got dict"),
        ("added_tokens.0", 3, "added_tokens[0] must be an object, got int"),
        ("added_tokens.0.content", "", "added_tokens[0].content must be text, got ''"),
        ("added_tokens.0.id", -3, "added_tokens[0].id must be a token id below"),
        ("added_tokens.0.id", 1 << 40, "added_tokens[0].id must be a token id below"),
        ("added_tokens.0.id", 5, "added_tokens[0].id is 5, but the vocabulary disagrees about '<|bos|>'"),
        ("model.ignore_merges", True, "model.vocab lets plain text become the control token '<|bos|>'"),
        ("decoder", None, "decoder must be ByteLevel or sentencepiece-like"),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "got ['WordPiece']"),
        ("normalizer", {"type": "Nonsense"}, "is not a usable tokenizer.json"),
    ],
)
def test_each_fault_is_named(folder: Path, path: str, value: Any, message: str | None):
    """Every broken field raises FormatError naming the file and that field."""
    _change(folder, path, value)
    if message is None:
        assert Tokenizer.load(folder).vocab_size == 301
        return
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        Tokenizer.load(folder)
    assert "tokenizer.json" in str(caught.value)


def test_a_merge_that_spells_a_control_token_is_refused(folder: Path):
    """Plain text could become EOS through such a merge."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"<|eo": 300, "s|>": 301}
    content["model"]["merges"].append(["<|eo", "s|>"])
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"makes the control token '<\|eos\|>' out of plain text"):
        Tokenizer.load(folder)


def test_control_tokens_that_readers_would_number_anew_are_refused(folder: Path):
    """Outside of the vocabulary they are numbered on from it by every reader, whatever the file says."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        del content["model"]["vocab"][token["content"]]
    file.write_text(json.dumps(content))
    with pytest.raises(
        FormatError, match=r"added_tokens gives '<\|bos\|>' the id 0, but its readers number it \d+, on"
    ):
        Tokenizer.load(folder)


def test_files_that_are_no_json_objects_are_refused(folder: Path):
    """Broken JSON, deep nesting, lists, repeated keys, and companions that are not what they should be."""
    file = folder / "tokenizer.json"
    whole = file.read_text()
    for content, message in [
        (whole[: len(whole) // 2], "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        (whole.replace('"version"', '"model": 1, "version"'), "the key 'model' occurs twice"),
    ]:
        file.write_text(content)
        with pytest.raises(FormatError, match=message):
            Tokenizer.load(folder)
    file.write_text(whole)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"tokenizer_config.json must hold a JSON object, got list"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template.jinja is not UTF-8"):
        Tokenizer.load(folder)


@pytest.mark.fuzz
def test_damaged_files_give_our_errors_only(folder: Path):
    """200 files with random bytes changed, cut or doubled: each loads or raises one of our errors."""
    file = folder / "tokenizer.json"
    whole = json.dumps(json.loads(file.read_text())).encode()
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            action = rng.randrange(3)
            if action == 0:
                data[at] = rng.choice(b'0123456789"{}[],:truefalsn\\ \xff')
            elif action == 1:
                del data[at : at + rng.randint(1, 50)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 50)]
        file.write_bytes(data)
        try:
            Tokenizer.load(folder).encode("the cat")
        except EntrenarError:
            refused += 1
    assert refused > 100

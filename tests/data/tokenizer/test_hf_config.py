"""`entrenar.data.tokenizer.hf_config`: the files next to a tokenizer give transformers' ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend

from entrenar.data import Tokenizer
from entrenar.errors import FormatError

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "a", "hi", "▁hi", "▁a"]
MERGES = ["h i", "▁ hi", "▁ a"]
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
SPECIAL = {**PLAIN, "special": True}
TEXTS = ["", "a", "hi", "</s>hi", "</s> hi", "hi</s>hi a", "<s>hi a</s><s>hi\n", "<|im|>hi</s>", "[PAD]hi", "é</s>é a"]


def content(**changes: Any) -> dict[str, Any]:
    """Return a small tokenizer.json of LLaMA's kind, as published ones are."""
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    prepend = [{"type": "Prepend", "prepend": "▁"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [{"id": index, "content": PIECES[index], **SPECIAL} for index in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": prepend},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "vocab": {piece: index for index, piece in enumerate(PIECES)}, "merges": MERGES,
                  "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "dropout": None},
        **changes,
    }  # fmt: skip


def folder(path: Path, config: dict[str, Any], added: dict[str, int] | None = None, **changes: Any) -> Path:
    """Write a tokenizer's folder."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(Backend.from_str(json.dumps(content(**changes))).to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({**CONTROL, **config}))
    if added is not None:
        (path / "added_tokens.json").write_text(json.dumps(added))
    return path


FIRST = len(PIECES)
DECODER = {
    **{str(index): {"content": PIECES[index], **SPECIAL} for index in range(3)},
    str(FIRST): {"content": "<|im|>", **SPECIAL},
}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CONFIGS = {
    "llama": LLAMA,
    "llama, fast": {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    "llama, legacy null": {**LLAMA, "legacy": None},
    "llama, legacy": {**LLAMA, "legacy": True},
    "llama, no prefix": {**LLAMA, "add_prefix_space": False},
    "llama, no prefix, legacy": {**LLAMA, "add_prefix_space": False, "legacy": True},
    "llama, prefix null": {**LLAMA, "add_prefix_space": None},
    "llama, decoder": {**LLAMA, "added_tokens_decoder": DECODER},
    "llama, decoder, pad": {**LLAMA, "added_tokens_decoder": DECODER, "pad_token": "[PAD]"},
    "llama, pad": {**LLAMA, "pad_token": "[PAD]"},
    "file": FAST,
    "file, flags of another class": {**FAST, "add_prefix_space": False, "legacy": True},
    "file, decoder": {**FAST, "added_tokens_decoder": DECODER},
    "file, pad": {**FAST, "pad_token": "[PAD]"},
    "file, pad as an object": {**FAST, "pad_token": {"__type": "AddedToken", "content": "[PAD]", **SPECIAL}},
    "file, extra": {**FAST, "additional_special_tokens": ["<|im|>", "[PAD]"]},
    "file, extra by name": {**FAST, "extra_special_tokens": {"image_token": "<|im|>"}},
    "file, extra and pad": {**FAST, "pad_token": "[PAD]", "extra_special_tokens": ["<|im|>"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ids_are_those_of_transformers(tmp_path: Path, name: str):
    """Spaces by the flags of LlamaTokenizer, added tokens by number, missing special tokens at the end."""
    path = folder(tmp_path / "given", CONFIGS[name])
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == len(theirs)
    if "pad_token" in CONFIGS[name]:
        assert ours.pad_id == theirs.pad_token_id
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == expected, text
        assert ours.encode_with_offsets(text)[0] == expected, text
    ours.save(tmp_path / "saved")
    again, theirs = Tokenizer.load(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.hash == ours.hash
    for text in TEXTS:
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True), text
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, allow_special=True), text


@pytest.mark.parametrize("config", [LLAMA, FAST])
def test_added_tokens_json_counts_where_the_config_has_no_decoder(tmp_path: Path, config: dict[str, Any]):
    """Tokens of older folders; they are special only if a role names them."""
    path = folder(tmp_path / "given", {**config, "pad_token": "<|pad|>"}, {"<|im|>": FIRST, "<|pad|>": FIRST + 1})
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    assert (ours.vocab_size, ours.pad_id, ours.id_of("<|im|>")) == (len(theirs), theirs.pad_token_id, FIRST)
    assert {FIRST, FIRST + 1} & ours.special_ids == {FIRST + 1}
    for text in ["<|im|>hi</s>a<|pad|>", "a<|im|> hi"]:
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
    path = folder(tmp_path / "decoder", {**config, "added_tokens_decoder": DECODER}, {"<|other|>": FIRST})
    assert Tokenizer.load(path).id_of("<|other|>") is None


@pytest.mark.parametrize("flags", [{"legacy": True}, {}])
def test_a_text_that_begins_with_a_space_keeps_it(tmp_path: Path, flags: dict[str, bool]):
    """Unlike transformers, like sentencepiece: the space in front of the text comes on top."""
    tokenizer = Tokenizer.load(folder(tmp_path, {**LLAMA, **flags}))
    asis = Backend.from_str(json.dumps(content()))
    for text in [" hi", "  a", "▁a", " "]:
        assert tokenizer.encode(text) == asis.encode(text, add_special_tokens=False).ids
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert {place for offset in offsets for place in offset} <= set(range(len(text) + 1))
        assert offsets[-1][1] == len(text)
    assert tokenizer.decode(tokenizer.encode("  a")) == "  a"


@pytest.mark.parametrize("field", ["add_bos_token", "add_eos_token"])
def test_a_flag_of_null_is_as_good_as_absent(tmp_path: Path, field: str):
    """The file then decides whether a text gets a BOS."""
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    start = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    tokenizer = Tokenizer.load(folder(tmp_path / "one", {field: None}, post_processor=start))
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert not Tokenizer.load(folder(tmp_path / "two", {field: None})).add_bos


def test_the_map_of_special_tokens_wins_where_there_is_no_decoder(tmp_path: Path):
    """Transformers reads special_tokens_map.json in older folders only."""
    for decoder, expected in [({}, 0), ({"added_tokens_decoder": DECODER}, 2)]:
        path = folder(tmp_path, {**FAST, "pad_token": "</s>", **decoder})
        (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
        assert Tokenizer.load(path).pad_id == transformers.AutoTokenizer.from_pretrained(path).pad_token_id == expected


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ([], None),
        (["<|im|>"], "added_tokens_decoder must be an object of tokens by id, got ['<|im|>']"),
        ({"x": {"content": "y"}}, "added_tokens_decoder['x'] must be a token with content, got {'content': 'y'}"),
        ({"7": "y"}, "added_tokens_decoder['7'] must be a token with content, got 'y'"),
        ({"7": {"content": ""}}, "added_tokens_decoder['7'] must be a token with content, got {'content': ''}"),
        ({"9": {"content": "<s>"}}, "id is 9, but the vocabulary disagrees about '<s>'"),
        ({str(FIRST + 5): {"content": "<|im|>"}}, f"gives '<|im|>' the id {FIRST + 5}"),
    ],
)
def test_a_faulty_decoder_is_refused_by_name(tmp_path: Path, decoder: Any, message: str | None):
    """Its place, its field and what stands there."""
    path = folder(tmp_path, {**FAST, "added_tokens_decoder": decoder})
    if message is None:
        assert Tokenizer.load(path).vocab_size == FIRST
        return
    with pytest.raises(FormatError) as caught:
        Tokenizer.load(path)
    assert message in str(caught.value)


def test_a_byte_level_file_is_no_llama_tokenizer(tmp_path: Path, tokenizer: Tokenizer):
    """Whatever its class says; transformers takes the file too."""
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **LLAMA, "add_prefix_space": False}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(" the cat") == tokenizer.encode(" the cat")


def test_a_padding_token_may_lie_outside_of_a_model(tmp_path: Path):
    """Nothing reads it, so a model without a row for it is whole; every other token needs one."""
    assert Tokenizer.load(folder(tmp_path / "pad", CONFIGS["file, pad"])).fits(FIRST)
    assert not Tokenizer.load(folder(tmp_path / "other", CONFIGS["file, decoder"])).fits(FIRST)
    assert Tokenizer.load(folder(tmp_path / "other", CONFIGS["file, decoder"])).fits(FIRST + 1)

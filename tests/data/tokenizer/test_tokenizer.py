"""`entrenar.data.tokenizer.tokenizer`: text to ids and back, exactly; text never becomes a control token."""

import hashlib
import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.errors import DataError, FormatError

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
HARD_STRINGS = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t\r\n",
    "def f(x):\n\treturn x  # ünïcödé",
    "\0\x01\x7f\x80",
    "👩‍👩‍👧‍👦 é e\u0301 \u200b\ufeff\ufffd",
    "<|bos|><|eos|><|pad|><s></s>",
    "1234567890 3.14159 0x7f",
    "a" * 1000,
    "▁under▁score",
]


@pytest.mark.property
@pytest.mark.kills("data.tokenizer.tokenizer", "before + found.ids + after", "before + found.ids[:-1] + after")
@given(TEXT)
def test_round_trip_is_exact_for_every_string(tokenizer: Tokenizer, text: str):
    """decode(encode(text)) is text, for any Unicode text."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_round_trip_of_hard_strings(tokenizer: Tokenizer, text: str):
    """Whitespace, control characters, joined emoji and spelled-out control tokens come back."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.property
@pytest.mark.kills(
    "data.tokenizer.tokenizer",
    "self._special_backend if allow_special else self._backend",
    "self._special_backend",
)
@given(st.lists(TEXT | st.sampled_from(["<|bos|>", "<|eos|>", "<|pad|>", "<|", "|>", "eos"]), max_size=6))
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]):
    """Whatever a user types, no control id appears unless `allow_special` is set."""
    assert not tokenizer.special_ids & set(tokenizer.encode("".join(parts)))


def test_control_tokens_are_read_only_when_asked(tokenizer: Tokenizer):
    """`allow_special` reads the names; `bos` and `eos` put the tokens around."""
    assert tokenizer.encode("<|eos|>", allow_special=True) == [tokenizer.eos_id]
    plain = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.bos_id, *plain]) == "the cat"
    assert tokenizer.decode([tokenizer.bos_id, *plain], skip_special=False) == "<|bos|>the cat"
    assert tokenizer.id_of("<|pad|>") == tokenizer.pad_id
    assert tokenizer.id_of("no such token") is None


def test_batches_equal_single_texts(tokenizer: Tokenizer):
    """`encode_batch` gives what `encode` gives, also for bytes."""
    assert tokenizer.encode_batch(HARD_STRINGS) == [tokenizer.encode(text) for text in HARD_STRINGS]
    assert tokenizer.encode("é".encode()) == tokenizer.encode("é")


def test_text_that_is_not_unicode_is_refused_with_its_place(tokenizer: Tokenizer):
    """Bytes that are not UTF-8 and lone surrogates raise DataError naming offset and value."""
    with pytest.raises(DataError, match="not UTF-8: byte 0xff at offset 2"):
        tokenizer.encode(b"ab\xff")
    with pytest.raises(DataError, match=r"lone surrogate U\+D800 at position 1"):
        tokenizer.encode("a\ud800")


def test_ids_outside_of_the_vocabulary_are_refused(tokenizer: Tokenizer):
    """Decoding an unknown or negative id raises DataError naming id and size."""
    for index in (tokenizer.vocab_size, -1):
        with pytest.raises(DataError, match=f"token id {index} is outside of the tokenizer's vocabulary of 300"):
            tokenizer.decode([index])


def test_save_and_load_keep_everything(tokenizer: Tokenizer, tmp_path: Path):
    """A saved tokenizer loads equal, from its folder and from its file, and its files are read by transformers."""
    tokenizer.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.hash == tokenizer.hash
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert (loaded.add_bos, loaded.add_eos) == (True, False)
        assert loaded.encode_batch(HARD_STRINGS) == tokenizer.encode_batch(HARD_STRINGS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in HARD_STRINGS:
        if "<" not in text:  # transformers reads control tokens out of text
            assert theirs(text).input_ids == tokenizer.encode(text, bos=True), text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_hash_names_the_mapping_and_nothing_else(tokenizer: Tokenizer, tmp_path: Path):
    """Layout, template and padding leave the hash; a merge, a normalizer or another EOS changes it."""
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def hash_of(**changes: object) -> str:
        return Tokenizer({**content, **changes}, config).hash

    same = {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}
    assert hash_of(**same) == tokenizer.hash
    assert hash_of(post_processor=None) == tokenizer.hash
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    assert hash_of(model={**content["model"], "merges": merges}) == tokenizer.hash
    assert hash_of(model={**content["model"], "merges": merges[:-1]}) != tokenizer.hash
    assert hash_of(normalizer={"type": "NFC"}) != tokenizer.hash
    assert Tokenizer(content, {**config, "eos_token": "<|pad|>"}).hash != tokenizer.hash
    assert len(tokenizer.hash) == len(hashlib.sha256().hexdigest())


def test_stored_truncation_does_not_cut_texts(tokenizer: Tokenizer, tmp_path: Path):
    """A truncation length that another program left in the file has no effect."""
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).encode("the cat sat on the mat") == tokenizer.encode("the cat sat on the mat")


def test_roles_come_from_the_config_then_the_map_then_known_names(tokenizer: Tokenizer, tmp_path: Path):
    """Where it lists its tokens, tokenizer_config.json wins over special_tokens_map.json; null means none."""
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.unlink()
    assert Tokenizer.load(tmp_path).eos_id == tokenizer.eos_id
    assert Tokenizer.load(tmp_path).add_bos is True  # from the post-processor's template
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|pad|>"}}')
    assert Tokenizer.load(tmp_path).eos_id == tokenizer.pad_id
    named = {"eos_token": "<|eos|>", "pad_token": None, "add_bos_token": False, "chat_template": "{{ x }}"}
    config.write_text(json.dumps({**named, "added_tokens_decoder": {}}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.add_bos) == (tokenizer.eos_id, None, False)
    assert loaded.chat_template == "{{ x }}"
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ y }}"
    assert tokenizer.chat_template is None


def test_a_named_token_that_does_not_exist_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    """The message says which role and which token."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(FormatError, match="eos_token is '<nope>', which the tokenizer does not have"):
        Tokenizer.load(tmp_path)


def test_a_missing_role_is_named_when_it_is_asked_for(tokenizer: Tokenizer, tmp_path: Path):
    """Asking for BOS of a tokenizer without one raises DataError with the remedy."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(DataError, match=r"no bos token; name one in tokenizer_config.json"):
        Tokenizer.load(tmp_path).encode("a", bos=True)


def test_role_tokens_count_as_special_though_the_file_forgot_it(tokenizer: Tokenizer, tmp_path: Path):
    """EOS stays out of reach of text even if tokenizer.json marks it as ordinary or does not list it."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for tokens in ([{**token, "special": False} for token in content["added_tokens"]], []):
        path.write_text(json.dumps({**content, "added_tokens": tokens, "post_processor": None}))
        loaded = Tokenizer.load(tmp_path)
        assert loaded.eos_id not in loaded.encode("<|eos|>")
        assert loaded.encode("<|eos|>", allow_special=True) == [loaded.eos_id]


def test_what_is_no_tokenizer_is_refused_with_the_way_out(tmp_path: Path):
    """Missing paths, empty folders and foreign suffixes raise DataError."""
    with pytest.raises(DataError, match=r"no tokenizer at .*nothing.json: give a tokenizer.json"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"it needs a tokenizer.json or a tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(DataError, match=r"its name must end in \.json, \.model or \.bin$"):
        Tokenizer.load(tmp_path / "vocab.txt")


def test_real_hugging_face_folder_equals_transformers(shared_data: Path):
    """The Llama 2 folder gives transformers' ids, with BOS by its config."""
    path = shared_data / "tokenizers/llama2_hf"
    ours, theirs = (
        Tokenizer.load(path),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json")),
    )
    theirs.backend_tokenizer.no_truncation()
    for text in HARD_STRINGS:
        if "<" not in text:
            assert ours.encode(text, bos=ours.add_bos) == theirs(text).input_ids, text
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 2, 32000)
    assert ours.chat_template is not None
    assert not ours.special_ids & set(ours.encode("<s></s><unk>"))

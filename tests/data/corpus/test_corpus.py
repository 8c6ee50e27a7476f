"""`entrenar.data.corpus.corpus`: a corpus opens whole, or says which file is damaged and what to do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data import Corpus, Tokenizer, check_same_tokenizer, train_bpe
from entrenar.errors import DataError, FormatError

STORIES = [f"story {number}" for number in range(20)]


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus(STORIES, shard_tokens=37)


def _change_manifest(folder: Path, path: str, value: Any) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    file.write_text(json.dumps(content))


@pytest.mark.property
@pytest.mark.kills("data.corpus.corpus", "first * self._dtype.itemsize)", "0 * self._dtype.itemsize)")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.data())
def test_windows_cross_shards_unseen(corpus: Corpus, data: st.DataObject):
    """Any part of the sequence reads as if there were one shard."""
    stream = corpus.stream("train")
    whole = stream.read(0, len(stream)).tolist()
    start = data.draw(st.integers(0, len(stream) - 1))
    stop = data.draw(st.integers(start + 1, len(stream)))
    assert len(corpus.manifest.splits["train"].shards) > 3
    assert stream.read(start, stop).tolist() == whole[start:stop]


def test_the_corpus_holds_its_tokenizer(corpus: Corpus, tokenizer: Tokenizer):
    """It opens without another folder, and names the same mapping."""
    assert corpus.tokenizer().hash == tokenizer.hash == corpus.manifest.tokenizer.sha256


def test_fingerprint_names_the_ids(make_corpus: Callable[..., Corpus], corpus: Corpus):
    """Equal ids give an equal fingerprint, another document another one."""
    assert make_corpus(STORIES, name="same", shard_tokens=37).fingerprint == corpus.fingerprint
    assert make_corpus([*STORIES, "more"], name="more", shard_tokens=37).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("name", ["train-00001.bin", "token_bytes.bin"])
def test_a_flipped_bit_is_found(corpus: Corpus, name: str):
    """One bit changed anywhere in a shard is refused by name; without verification only the size is looked at."""
    path = corpus.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{name} is damaged: its SHA-256 is not the manifest's; restore the file or"):
        Corpus.open(corpus.folder)
    if name.startswith("train"):
        assert len(Corpus.open(corpus.folder, verify=False).stream("train")) == len(corpus.stream("train"))


def test_a_shortened_or_missing_shard_is_found_without_reading_it(corpus: Corpus):
    """Sizes are always checked."""
    path = corpus.folder / "train-00000.bin"
    os.truncate(path, 70)
    with pytest.raises(DataError, match=r"train-00000.bin is damaged: it has 70 bytes, the manifest says 74"):
        Corpus.open(corpus.folder, verify=False)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000.bin is missing; restore the file or prepare the corpus again"):
        Corpus.open(corpus.folder, verify=False)


def test_a_shard_that_shrinks_under_the_run_is_an_error_not_a_crash(corpus: Corpus):
    """Reading past the new end raises DataError naming the shard."""
    os.truncate(corpus.folder / "train-00000.bin", 10)
    with pytest.raises(DataError, match=r"train-00000.bin ends early: it changed while in use"):
        corpus.stream("train").read(0, 20)


def test_what_is_no_corpus_is_refused(tmp_path: Path):
    """A folder without manifest says how to make one."""
    with pytest.raises(DataError, match=r"is not a corpus: it has no manifest.json; make one with `entrenar prepare"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "format must be 'entrenar-corpus'"),
        ("version", 2, "version must be 1, got 2; prepare the corpus again"),
        ("dtype", "int8", "dtype: Input should be 'uint16' or 'uint32', got 'int8'"),
        ("extra", 1, "extra: Extra inputs are not permitted"),
        ("splits.train.tokens", "many", "splits.train.tokens: Input should be a valid integer, got 'many'"),
        ("splits.train.tokens", 5, "splits.train: the shards' token counts do not add up to 5"),
        ("splits.train.shards.0.tokens", 36, "splits.train: the shards' token counts do not add up"),
        ("splits.train.shards.0.file", "../../etc/passwd", "shard '../../etc/passwd' must lie in the corpus' folder"),
        ("splits.test", {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}, "splits must be train and val, got"),
        ("tokenizer.vocab_size", 0, "tokenizer.vocab_size: Input should be greater than 0, got 0"),
    ],
)
def test_each_fault_of_a_manifest_is_named(corpus: Corpus, path: str, value: Any, message: str):
    """FormatError names file and field."""
    _change_manifest(corpus.folder, path, value)
    with pytest.raises(FormatError) as caught:
        Corpus.open(corpus.folder)
    assert message in str(caught.value)
    assert "manifest.json" in str(caught.value)


def test_a_manifest_that_is_no_json_object_is_refused(corpus: Corpus):
    """Broken JSON and a list."""
    for content, message in (("{", "is not valid JSON"), ("[]", "format must be 'entrenar-corpus'")):
        (corpus.folder / "manifest.json").write_text(content)
        with pytest.raises(FormatError, match=message):
            Corpus.open(corpus.folder)


def test_another_tokenizer_is_refused_with_both_names(corpus: Corpus, tokenizer: Tokenizer):
    """The check passes for the same mapping and names both hashes otherwise."""
    check_same_tokenizer([corpus], tokenizer.hash, "model runs/a")
    other = train_bpe(["other words"] * 3, 262)
    expected = f"was made with tokenizer {tokenizer.hash[:12]}…, model runs/a uses {other.hash[:12]}…; prepare it again"
    with pytest.raises(DataError, match=expected):
        check_same_tokenizer([corpus], other.hash, "model runs/a")

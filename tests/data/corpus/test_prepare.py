"""`entrenar.data.corpus.prepare`: sources become a corpus, the same one every time, and bad sources are named."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data import Corpus, PrepareConfig, Progress, Tokenizer, prepare, train_bpe
from entrenar.data.corpus.dedup import document_hash
from entrenar.errors import DataError, DiskFullError
from entrenar.files import TEMPORARY_PREFIX, sha256_file

STORIES = [f"story {number}: the cat sat on mat {number * 7}\n\tend é" for number in range(200)]


def documents_of(corpus: Corpus, split: Any, tokenizer: Tokenizer) -> list[str]:
    """Read a split back by its BOS and EOS alone."""
    stream = corpus.stream(split)
    found: list[str] = []
    current: list[int] = []
    for index in stream.read(0, len(stream)).tolist():
        if index == tokenizer.bos_id:
            current = []
        elif index == tokenizer.eos_id:
            found.append(tokenizer.decode(current))
        else:
            current.append(index)
    return found


@pytest.mark.property
@pytest.mark.kills("data.corpus.shards", "data = part.tobytes()", "data = part[::-1].tobytes()")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), min_size=1, max_size=8, unique=True),
    st.integers(1, 50),
)
def test_every_document_comes_back_from_the_shards(
    tmp_path: Path, tokenizer: Tokenizer, documents: list[str], shard_tokens: int
):
    """Decoding the shards at their BOS and EOS gives the documents, in order, however the shards are cut."""
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": document}) for document in documents), "utf-8")
    kept = [document for document in documents if not document.isspace()]
    config = PrepareConfig(val_fraction=0, shard_tokens=shard_tokens, threads=1)
    if not kept:
        return
    manifest = prepare([source], tmp_path / "corpus", config, tokenizer=tokenizer)
    corpus = Corpus.open(tmp_path / "corpus")
    assert documents_of(corpus, "train", tokenizer) == kept
    assert manifest.splits["train"].bytes == sum(len(document.encode()) for document in kept)
    assert manifest.splits["train"].documents == len(kept)
    assert manifest.lossy_documents == 0


def test_the_split_is_by_document_and_whole(make_corpus: Callable[..., Corpus], tokenizer: Tokenizer):
    """Every document is in one split, decided by its hash alone; the shares are near the wanted ones."""
    corpus = make_corpus(STORIES, val_fraction=0.25)
    train, val = (documents_of(corpus, split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(STORIES)
    assert val == [story for story in STORIES if document_hash(story.encode()) < 0.25 * 2**64]
    assert 30 <= len(val) <= 70
    again = make_corpus(STORIES[::-1], name="reversed", val_fraction=0.25)
    assert sorted(documents_of(again, "val", tokenizer)) == sorted(val)


def test_equal_documents_are_kept_once(make_corpus: Callable[..., Corpus], tokenizer: Tokenizer):
    """Later copies are dropped and counted, unless told otherwise."""
    doubled = STORIES[:50] + STORIES[10:30] + ["new"]
    corpus = make_corpus(doubled)
    assert documents_of(corpus, "train", tokenizer) == [*STORIES[:50], "new"]
    assert corpus.manifest.duplicates == 20
    kept = make_corpus(doubled, name="kept", dedup=False)
    assert documents_of(kept, "train", tokenizer) == doubled


def test_the_corpus_does_not_depend_on_threads(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """One thread and three give the same bytes in every file."""
    monkeypatch.setattr(sys.modules["entrenar.data.corpus.prepare"], "_BATCH_BYTES", 300)
    source = tmp_path / "text.txt"
    source.write_text("\n###\n".join(STORIES), "utf-8")
    for threads in (1, 3):
        config = PrepareConfig(document_separator="###", threads=threads, val_fraction=0.1, shard_tokens=1000)
        prepare([source], tmp_path / f"corpus{threads}", config, tokenizer=tokenizer)
    names = sorted(path.name for path in (tmp_path / "corpus1").iterdir())
    assert len(names) > 6
    for name in names:
        assert (tmp_path / "corpus1" / name).read_bytes() == (tmp_path / "corpus3" / name).read_bytes(), name


def test_a_tokenizer_is_trained_on_the_training_split_only(tmp_path: Path):
    """Without a tokenizer one is trained, the same every time; held-out words leave no merge."""
    held_out = [f"zyx{number}qqq " * 40 for number in range(400)]
    documents = [text for text in held_out if document_hash(text.encode()) < 0.02 * 2**64]
    assert documents
    (tmp_path / "a.txt").write_text("\n###\n".join([*STORIES, *documents]), "utf-8")
    config = PrepareConfig(document_separator="###", val_fraction=0.02, vocab_size=400)
    seen: list[str] = []
    first = prepare([tmp_path / "a.txt"], tmp_path / "one", config, progress=lambda now: seen.append(now.stage))
    second = prepare([tmp_path / "a.txt"], tmp_path / "two", config)
    assert first == second
    tokenizer = Corpus.open(tmp_path / "one").tokenizer()
    assert not [token for token in tokenizer.token_bytes if b"zyx" in token or b"qqq" in token]
    assert [token for token in tokenizer.token_bytes if b"story" in token]
    assert seen[0] == "tokenizer"
    assert seen[-1] == "encode"


def test_the_sample_for_the_tokenizer_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The given bytes are seen, to within a document, spread over the whole source."""
    (tmp_path / "a.txt").write_text("\n###\n".join([*STORIES, "rareword " * 2]), "utf-8")
    config = PrepareConfig(document_separator="###", val_fraction=0, vocab_size=300, tokenizer_sample_bytes=1200)
    seen: list[str] = []

    def recording(texts: Any, vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(seen, vocab_size)

    monkeypatch.setattr(sys.modules["entrenar.data.corpus.prepare"], "train_bpe", recording)
    prepare([tmp_path / "a.txt"], tmp_path / "out", config)
    assert 300 < sum(len(text.encode()) for text in seen) <= 1200 + max(len(text.encode()) for text in STORIES)
    assert max(STORIES.index(text) for text in seen if text in STORIES) > 100


def test_many_ids_are_stored_in_32_bits(make_corpus: Callable[..., Corpus], tokenizer: Tokenizer, tmp_path: Path):
    """A vocabulary of 65,536 fits 16 bits, one more does not; the ids come back either way."""
    tokenizer.save(tmp_path / "t")
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    for top, dtype, itemsize in ((65535, "uint16", 2), (65536, "uint32", 4)):
        content["model"]["vocab"]["zz"] = top
        larger = Tokenizer(content)
        corpus = make_corpus(["a zz b"], name=dtype, encoder=larger)
        assert (larger.vocab_size, corpus.manifest.dtype) == (top + 1, dtype)
        assert (corpus.folder / "train-00000.bin").stat().st_size == itemsize * len(corpus.stream("train"))
        assert documents_of(corpus, "train", larger) == ["a zz b"]


def test_the_manifest_vouches_for_sources_tokenizer_and_shards(tmp_path: Path, tokenizer: Tokenizer):
    """Counts and hashes are those of the files; changing one source byte changes its hash."""
    folder = tmp_path / "src"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(STORIES[number], "utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    config = PrepareConfig(val_fraction=0.2)
    manifest = prepare([folder], tmp_path / "corpus", config, tokenizer=tokenizer)
    assert manifest.tokenizer.sha256 == tokenizer.hash
    assert sum(split.documents for split in manifest.splits.values()) == 30
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(s.encode()) for s in STORIES[:30])
    assert [(entry.reason, entry.names) for entry in manifest.skipped] == [("binary", ["picture.png"])]
    for split in manifest.splits.values():
        for shard in split.shards:
            assert sha256_file(tmp_path / "corpus" / shard.file) == shard.sha256
    assert manifest.options["val_fraction"] == 0.2
    (folder / "00.txt").write_text("changed", "utf-8")
    changed = prepare([folder], tmp_path / "corpus", config, tokenizer=tokenizer)
    assert changed.sources[0].sha256 != manifest.sources[0].sha256


def test_progress_ends_at_the_totals(tmp_path: Path, tokenizer: Tokenizer):
    """The last report has all files, bytes, documents and tokens."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(STORIES[number], "utf-8")
    reports: list[tuple[int, int]] = []
    last: list[Progress] = []

    def note(now: Progress) -> None:
        reports.append((now.files, now.bytes_read))
        last[:] = [now]

    sources = sorted(tmp_path.glob("*.txt"))
    manifest = prepare(sources, tmp_path / "out", PrepareConfig(val_fraction=0), tokenizer=tokenizer, progress=note)
    assert reports == sorted(reports)
    assert (last[0].files, last[0].bytes_read) == (last[0].total_files, last[0].total_bytes) == (5, reports[-1][1])
    assert (last[0].documents, last[0].tokens) == (5, manifest.splits["train"].tokens)


def test_documents_that_the_tokenizer_cannot_spell_are_counted(
    make_corpus: Callable[..., Corpus], tokenizer: Tokenizer, tmp_path: Path
):
    """A normalizer that changes the text makes a document lossy; the manifest says how many."""
    tokenizer.save(tmp_path / "t")
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "é"}, "content": "e"}
    corpus = make_corpus(["café", "cafe", "tea"], encoder=Tokenizer({**content, "normalizer": replace}))
    assert corpus.manifest.lossy_documents == 1


def test_a_tokenizer_with_one_boundary_token_uses_it_for_both(
    make_corpus: Callable[..., Corpus], tokenizer: Tokenizer, tmp_path: Path
):
    """With EOS only, a document is EOS, tokens, EOS; with neither, prepare refuses."""
    tokenizer.save(tmp_path / "t")
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    only_eos = Tokenizer(content, {"bos_token": None, "eos_token": "<|eos|>"})
    stream = make_corpus(["a", "b"], encoder=only_eos).stream("train")
    ids = stream.read(0, len(stream)).tolist()
    assert [ids[0], ids[2], ids[3], ids[5]] == [1, 1, 1, 1]
    with pytest.raises(DataError, match="neither a BOS nor an EOS token"):
        make_corpus(["a"], name="no", encoder=Tokenizer(content, {"bos_token": None, "eos_token": None}))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "source .*a.txt has no document: it is empty"),
        (b" \n\t\n", {}, "source .*a.txt has no document: it is empty"),
        (b"text\0", {}, "is binary, not text"),
        (b"\xff", {}, "is not UTF-8"),
        (b"document", {"val_fraction": 0.02}, "the held-out split is empty: 1 documents, val_fraction 0.02; raise"),
        (b"one document", {"val_fraction": 0.999}, "the train split is empty: 1 documents"),
    ],
)
def test_bad_sources_leave_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, options: dict[str, float], message: str
):
    """The error says what is wrong, and neither a corpus nor a temporary folder stays."""
    source = tmp_path / "a.txt"
    source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([source], tmp_path / "out", PrepareConfig.model_validate(options), tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_without_text_says_why(tmp_path: Path, tokenizer: Tokenizer):
    """All files left out: the reasons are in the message."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.bin").write_bytes(b"\0")
    (tmp_path / "src" / "b.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"its files were left out: 1 binary \(a.bin\); 1 empty \(b.txt\)"):
        prepare([tmp_path / "src"], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"no text to train a tokenizer on: files were left out: 1 binary \(a.bin\); 1"):
        prepare([tmp_path / "src"], tmp_path / "out")


def test_text_that_is_all_held_out_trains_no_tokenizer_and_says_why(tmp_path: Path):
    """One document in the held-out split is not "empty"."""
    (tmp_path / "a.txt").write_text("words of one document")
    with pytest.raises(DataError, match=r"none of the 2 documents fell into the sample; .* lower val_fraction \(0.999"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", PrepareConfig(val_fraction=0.999999, threads=1))


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, tokenizer: Tokenizer):
    """Only a corpus or an empty folder is written over, and never a source."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.txt").write_text("text")
    config = PrepareConfig(val_fraction=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine exists and is not a corpus, so it is not replaced"):
        prepare([source], tmp_path / "mine", config, tokenizer=tokenizer)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text('{"version": 1, "step": 1}')  # a checkpoint has one too
    with pytest.raises(DataError, match="step-00000001 exists and is not a corpus, so it is not replaced"):
        prepare([source], tmp_path / "step-00000001", config, tokenizer=tokenizer)
    with pytest.raises(DataError, match="the corpus would become its own source"):
        prepare([source], source / "corpus", config, tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, then the corpus that is there
        prepare([source], tmp_path / "empty", config, tokenizer=tokenizer)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_sample_smaller_than_a_document_still_trains(tmp_path: Path):
    """One document is always seen."""
    (tmp_path / "a.txt").write_text("word " * 100)
    config = PrepareConfig(val_fraction=0, vocab_size=262, tokenizer_sample_bytes=499, threads=1)
    prepare([tmp_path / "a.txt"], tmp_path / "out", config)
    assert b"wor" in b"".join(Corpus.open(tmp_path / "out").tokenizer().token_bytes[259:])


def test_the_switch_of_tokenizers_is_put_back(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A user's own TOKENIZERS_PARALLELISM is as before; a tokenizer may be named by its path."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    (tmp_path / "a.txt").write_text("the cat")
    tokenizer.save(tmp_path / "t")
    config = PrepareConfig(val_fraction=0)
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", config, tokenizer=tmp_path / "t")
    assert manifest.tokenizer.sha256 == tokenizer.hash
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.chaos
def test_a_full_disk_leaves_the_old_corpus(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """ENOSPC in the middle of a shard raises DiskFullError; the corpus from before still opens."""
    source = tmp_path / "a.txt"
    source.write_text("first text")
    config = PrepareConfig(val_fraction=0)
    before = prepare([source], tmp_path / "out", config, tokenizer=tokenizer)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("entrenar.data.corpus.shards.ShardWriter.write", full)
    source.write_text("second text")
    with pytest.raises(DiskFullError, match="no space left"):
        prepare([source], tmp_path / "out", config, tokenizer=tokenizer)
    assert Corpus.open(tmp_path / "out").manifest == before
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_an_error_in_a_worker_reaches_the_caller(tmp_path: Path, tokenizer: Tokenizer):
    """A progress callback or a worker that fails stops the run and leaves nothing."""
    source = tmp_path / "a.txt"
    source.write_text("text")

    def fail(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", PrepareConfig(val_fraction=0), tokenizer=tokenizer, progress=fail)
    assert not (tmp_path / "out").exists()


def test_token_bytes_are_the_bytes_of_each_id(make_corpus: Callable[..., Corpus], tokenizer: Tokenizer):
    """Control tokens stand for no text; the others for their bytes."""
    corpus = make_corpus(["a"])
    expected = [0 if index in tokenizer.special_ids else len(data) for index, data in enumerate(tokenizer.token_bytes)]
    assert np.array_equal(corpus.token_bytes, expected)


def test_a_lone_text_file_is_cut_so_that_something_can_be_held_out(tmp_path):
    """One text file without separators gives a corpus with both splits; told how to cut, it is cut that way."""
    text = tmp_path / "play.txt"
    text.write_text(
        "".join(f"Line {number} of the only play there is.\n" for number in range(20_000)), encoding="utf-8"
    )
    manifest = prepare([text], tmp_path / "corpus", PrepareConfig(vocab_size=300, threads=1))
    assert manifest.splits["val"].documents >= 1
    assert 100 <= manifest.splits["train"].documents <= 250
    tenth = PrepareConfig(vocab_size=300, threads=1, val_fraction=0.1)
    assert prepare([text], tmp_path / "tenth", tenth).splits["train"].documents <= 50
    nothing = PrepareConfig(vocab_size=300, threads=1, val_fraction=0)
    assert prepare([text], tmp_path / "nothing", nothing).splits["train"].documents == 1
    whole = PrepareConfig(vocab_size=300, threads=1, val_fraction=0, max_document_bytes=1 << 20)
    assert prepare([text], tmp_path / "whole", whole).splits["train"].documents == 1


def test_a_small_source_holds_something_out(tmp_path: Path):
    """Of a handful of documents by chance none is held out, so the one of the smallest hash is; the others train."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"note {number}: the cat sat and ran " * 20)
    (tmp_path / "poem.txt").write_text("".join(f"line {number} of a short poem\n" for number in range(12)))
    for source, documents in ((folder, 3), (tmp_path / "poem.txt", 3)):
        splits = prepare([source], tmp_path / "out", PrepareConfig(vocab_size=300, threads=1), overwrite=True).splits
        assert splits["val"].documents == 1
        assert splits["train"].documents >= documents - 1


def test_another_corpus_is_replaced_only_when_asked(tmp_path: Path, tokenizer: Tokenizer):
    """The same sources make it again; other sources need `overwrite`, and the message names the old ones."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n" * 50)
    out, config = tmp_path / "corpus", PrepareConfig(val_fraction=0, threads=1)
    first = prepare([tmp_path / "a.txt"], out, config, tokenizer=tokenizer)
    assert prepare([tmp_path / "a.txt"], out, config, tokenizer=tokenizer) == first
    with pytest.raises(DataError, match=r"holds another corpus, made from .*a\.txt; replace it with --overwrite"):
        prepare([tmp_path / "b.txt"], out, config, tokenizer=tokenizer)
    assert Corpus.open(out).manifest == first
    assert prepare([tmp_path / "b.txt"], out, config, tokenizer=tokenizer, overwrite=True) != first


def test_what_a_folder_leaves_out_is_in_the_manifest(tmp_path: Path, tokenizer: Tokenizer):
    """Files and rows, with the reason and the first names."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "the cat"}\n{"story": "x"}\n{"text": "the dog"}\n')
    (folder / "b.csv").write_text('text,n\nsat,1\nran,"2\n')
    (folder / ".hidden").write_text("h")
    manifest = prepare([folder], tmp_path / "out", PrepareConfig(val_fraction=0), tokenizer=tokenizer)
    assert manifest.splits["train"].documents == 3
    assert {(one.reason, *one.names) for one in manifest.skipped} == {
        ("rows without text in 'text'", "a.jsonl:2"), ("rest of a file that cannot be read", "b.csv:3"),
        ("hidden", ".hidden"),
    }  # fmt: skip

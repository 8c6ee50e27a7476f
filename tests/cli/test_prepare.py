"""`entrenar prepare` makes a corpus, says what is in it, and makes it once."""

import pytest

from entrenar.cli.main import main
from entrenar.data import Corpus


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"value {number % 5} and the others follow it. " * 40)
    (folder / "raw.bin").write_bytes(b"\x00\xff\xfe" * 100)
    return folder


def test_a_corpus_is_made_and_summed_up(sources, tmp_path, capsys):
    """Documents, tokens, duplicates and what was left out are told, and are those of the corpus."""
    out = tmp_path / "corpus"
    words = [
        "prepare",
        str(sources),
        "--out",
        str(out),
        "--vocab-size",
        "300",
        "--val-fraction",
        "0.2",
        "--threads",
        "1",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    manifest = Corpus.open(out).manifest
    assert f"{out}: vocabulary of {manifest.tokenizer.vocab_size:,}" in said
    assert f"{manifest.splits['train'].documents} documents" in said
    assert f"{manifest.duplicates} duplicate" in said
    assert manifest.duplicates == 1
    assert "1 file left out" in said
    assert "raw.bin" in said


def test_a_lone_text_says_how_it_is_cut_and_another_corpus_stays(tmp_path, capsys):
    """The cut is printed with its flags; other sources need --overwrite; a corpus without held-out text says so."""
    text, out = tmp_path / "play.txt", tmp_path / "corpus"
    text.write_text("a line of the only play there is\n" * 400)
    words = ["prepare", str(text), "--out", str(out), "--vocab-size", "300", "--threads", "1"]
    assert main(words) == 0
    limit = Corpus.open(out).manifest.options["max_document_bytes"]
    assert f"texts longer than {limit:,} bytes are cut at line starts" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 400)
    words = ["prepare", str(other), "--out", str(out), "--vocab-size", "300", "--val-fraction", "0"]
    assert main(words) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "nothing is held out" in capsys.readouterr().out


def test_a_whole_corpus_is_not_made_again(sources, tmp_path, capsys):
    """`--if-missing` leaves a corpus alone, and does not take a damaged one for whole."""
    out = tmp_path / "corpus"
    words = ["prepare", str(sources), "--out", str(out), "--vocab-size", "300", "--threads", "1", "--if-missing"]
    assert main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out} is there and whole\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shard = next(out.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert main(words) == 2


def test_a_missing_source_is_told(tmp_path, capsys):
    """The exit code is 2, and the name is in the message."""
    assert main(["prepare", str(tmp_path / "nowhere"), "--out", str(tmp_path / "corpus")]) == 2
    assert "nowhere" in capsys.readouterr().err

"""`entrenar data`: what is trained is seen, and every row of no use is named by file and line."""

import json
from pathlib import Path

import pytest

from entrenar.cli.main import main
from entrenar.data import train_bpe
from entrenar.model import LlamaConfig


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer."""
    train_bpe(["the cat sat on the mat and ran"] * 4, 300).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "the mat", "completion": " "}, {"x": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_show_marks_what_is_trained(model, file, capsys):
    """Where there is no colour, trained tokens stand between « and »; faults are shown too."""
    assert main(["data", "show", file, "--model", model]) == 0
    said = capsys.readouterr().out
    assert "the cat« sat<|eos|>»" in said
    assert f"{file}:2: completion is empty" in said
    assert main(["data", "show", file, "--model", model, "--train-on", "all", "--rows", "1"]) == 0
    assert "«the cat sat<|eos|>»" in capsys.readouterr().out


def test_check_names_every_fault_and_answers_with_2(model, file, capsys, tmp_path):
    """Each bad row has file, line and kind; they can be written to a file; a clean file gives 0."""
    quarantine = tmp_path / "bad.jsonl"
    assert main(["data", "check", file, "--model", model, "--quarantine", str(quarantine)]) == 2
    said = capsys.readouterr().out
    assert f"{file}:2: empty_answer: " in said
    assert f"{file}:3: shape: no known shape" in said
    assert "1 of 3 rows" in said
    assert [json.loads(line)["kind"] for line in quarantine.read_text().splitlines()] == ["empty_answer", "shape"]
    clean = tmp_path / "clean.jsonl"
    clean.write_text('{"text": "the cat"}\n{"text": "the cat"}\n{"text": "the cat sat on the mat"}\n')
    assert main(["data", "check", str(clean), "--model", model, "--seq-len", "5"]) == 0
    said = capsys.readouterr().out
    assert f"{clean}:2: duplicate: the same tokens as {clean}:1" in said
    assert f"{clean}:3: too_long: " in said


def test_rows_are_held_to_the_context_of_the_model(model, tmp_path, capsys):
    """What training leaves out for its length is told before; a length that is given wins."""
    config = LlamaConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=64, max_seq_len=5)
    (Path(model) / "config.json").write_text(json.dumps(config.to_hf()))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n{"text": "the cat sat on the mat"}\n')
    assert main(["data", "check", str(rows), "--model", model]) == 0
    said = capsys.readouterr().out
    assert f"{rows}:2: too_long: " in said
    assert "1 row longer than seq_len = 5 left out" in said
    assert main(["data", "check", str(rows), "--model", model, "--seq-len", "9"]) == 0
    assert "2 of 2 rows" in capsys.readouterr().out


def test_a_check_that_leaves_nothing_to_train_on_answers_with_2(model, tmp_path, capsys):
    """Training would stop there too: an empty file, or rows that are all too long."""
    rows = tmp_path / "rows.jsonl"
    for text in ("", '{"text": "the cat sat on the mat"}\n'):
        rows.write_text(text)
        assert main(["data", "check", str(rows), "--model", model, "--seq-len", "2"]) == 2
        assert "no row can be trained on" in capsys.readouterr().out


def test_own_templates_read_a_table(model, tmp_path, capsys):
    """Columns and templates make a task of a table without a header."""
    table = tmp_path / "rows.tsv"
    table.write_text("the cat\t1\n")
    words = ["data", "show", str(table), "--model", model, "--columns", "sentence,label"]
    assert main([*words, "--prompt-template", "{sentence}:", "--completion-template", " {label}"]) == 0
    assert "the cat:« 1<|eos|>»" in capsys.readouterr().out


def test_a_wrong_option_is_answered_with_the_rule(model, file, capsys):
    """A word that an option does not know ends with 2 and its name."""
    assert main(["data", "check", file, "--model", model, "--train-on", "nothing"]) == 2
    assert "--train-on: Input should be 'answers', 'last' or 'all'" in capsys.readouterr().err
    assert main(["data", "check", file, "--model", str(file) + "x"]) == 2

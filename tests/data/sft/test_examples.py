"""From files to examples: every fault with its line, every choice of the user kept, equal rows on one side."""

import json

import numpy as np
import pytest

from entrenar.data import SftConfig, accept, read_examples, split, total_tokens
from entrenar.data.sft.encode import Example
from entrenar.errors import DataError


def row(question, answer):
    return {"prompt": question, "completion": answer}


ROWS = [row("the cat", " sat"), row("the", ""), row("the dog", " ran"), row("the cat", " sat"), row("x " * 60, " y")]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS) + "{broken\n")
    return path


def config(file, **options):
    return SftConfig.model_validate({"data": file, "seq_len": 40, **options})


def test_every_fault_is_found_in_one_pass(file, tokenizer):
    """An empty answer, broken JSON, a long row and a duplicate each have their line."""
    rows = read_examples([file], tokenizer, config(file))
    assert rows.num_rows == 6
    assert [example.place for example in rows.examples] == [f"{file}:{line}" for line in (1, 3, 4)]
    assert [(fault.place, fault.kind) for fault in rows.bad] == [(f"{file}:2", "empty_answer"), (f"{file}:6", "broken")]
    assert [fault.place for fault in rows.too_long] == [f"{file}:5"]
    assert rows.duplicates == [(f"{file}:4", f"{file}:1")]
    notes = "\n".join(rows.notes(config(file)))
    assert "3 of 6 rows" in notes
    assert f"{total_tokens(rows.examples)} tokens, {sum(e.is_trained.sum() for e in rows.examples)} of them" in notes
    assert "1 rows longer than seq_len = 40 left out" in notes
    assert f"1 rows stand twice ({file}:4 is {file}:1)" in notes
    assert "2 rows cannot be used: 1 empty_answer, 1 broken" in notes


def test_rows_of_a_json_file_in_one_line_are_told_apart(tokenizer, tmp_path):
    """A duplicate and a long row are named by their numbers, for they all stand in line 1."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    rows = read_examples([path], tokenizer, config(path))
    notes = "\n".join(rows.notes(config(path)))
    assert f"1 rows longer than seq_len = 40 left out ({path}:1 (row 5) …)" in notes
    assert f"1 rows stand twice ({path}:1 (row 4) is {path}:1)" in notes


def test_bad_rows_stop_the_run_or_go_to_quarantine(file, tokenizer, tmp_path):
    """`stop` names the lines; quarantine writes them with their reasons and lets the others through."""
    rows = read_examples([file], tokenizer, config(file))
    with pytest.raises(DataError, match=r"(?s)2 of 6 rows cannot be used:.*rows.jsonl:2: completion is empty.*:6: not"):
        accept(rows, config(file), tmp_path / "q.jsonl")
    assert not (tmp_path / "q.jsonl").exists()
    kept = accept(rows, config(file, bad_rows="quarantine"), tmp_path / "run" / "q.jsonl")
    assert kept == rows.examples
    written = [json.loads(line) for line in (tmp_path / "run" / "q.jsonl").read_text().splitlines()]
    assert written[0] == {
        "place": f"{file}:2", "kind": "empty_answer", "reason": "completion is empty, so there is no answer to train",
        "row": ROWS[1],
    }  # fmt: skip
    assert written[1]["row"] == "{broken"


def test_many_bad_rows_are_counted_not_listed(tmp_path, tokenizer):
    """Ten faults are shown and the rest counted."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n' * 13)
    with pytest.raises(DataError, match="… and 3 more"):
        accept(read_examples([file], tokenizer, config(file)), config(file), tmp_path / "q")


def test_long_rows_are_dropped_cut_or_stopped(file, tokenizer):
    """`cut` keeps seq_len + 1 tokens if an answer is left in them; stop makes the row a bad one."""
    text = file.with_name("text.jsonl")
    text.write_text(json.dumps({"text": "the cat " * 40}))
    (whole,) = read_examples([text], tokenizer, config(file, seq_len=400)).examples
    (cut,) = read_examples([text], tokenizer, config(file, long_rows="cut")).examples
    assert cut.num_inputs == 40
    assert np.array_equal(cut.ids, whole.ids[:41])
    assert "cut (" in "\n".join(read_examples([text], tokenizer, config(file, long_rows="cut")).notes(
        config(file, long_rows="cut")))  # fmt: skip
    masked = read_examples([file], tokenizer, config(file, long_rows="cut"))
    assert "the cut leaves nothing of the answer" in str(masked.bad[1])
    stopped = read_examples([file], tokenizer, config(file, long_rows="stop"))
    assert "seq_len = 40 holds 41; raise seq_len, or set long_rows = drop or cut" in str(stopped.bad[1])


def test_no_usable_row_is_an_error(tmp_path, tokenizer):
    """All rows too long, or no rows at all: the reason is counted."""
    long, empty = tmp_path / "long.jsonl", tmp_path / "empty.jsonl"
    long.write_text(json.dumps({"text": "the cat " * 40}))
    empty.write_text("")
    for file, reason in ((long, "1 too_long"), (empty, "the files are empty")):
        with pytest.raises(DataError, match=f"no row of .* can be trained on: {reason}"):
            accept(read_examples([file], tokenizer, config(file)), config(file), tmp_path / "q")


def examples(count):
    return [
        Example(f"f:{i}", np.array([1, i % 50, 2], dtype=np.int32), np.array([False, True, True])) for i in range(count)
    ]


def test_equal_rows_fall_on_one_side_whatever_the_order():
    """The split depends on seed and content: duplicates stay together, and a shuffled file splits alike."""
    rows = examples(100)
    train, held_out = split(rows, 0.2, seed=3)
    assert {e.ids[1] for e in train}.isdisjoint({int(e.ids[1]) for e in held_out})
    assert len(train) + len(held_out) == 100
    assert 10 <= len(held_out) <= 30
    assert {e.place for e in split(rows[::-1], 0.2, seed=3)[1]} == {e.place for e in held_out}
    assert {e.place for e in split(rows, 0.2, seed=4)[1]} != {e.place for e in held_out}
    assert split(rows, 0.0, seed=3) == (rows, [])


def test_a_split_that_leaves_nothing_is_refused():
    """One row cannot be both trained on and held out."""
    with pytest.raises(DataError, match=r"holding out 0\.5 of 1 rows leaves none to train on"):
        split(examples(1), 0.5, seed=0)


def test_templates_come_in_pairs(file):
    """One template without the other is a fault of the config."""
    for given in ({"prompt_template": "x"}, {"completion_template": "x"}):
        with pytest.raises(ValueError, match="must be given together"):
            config(file, **given)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("alpaca_subset.json", {}, 3800),
        ("instruction-data.json", {}, 1099),
        ("gsm8k_test.jsonl", {"prompt_template": "{question}\n", "completion_template": "{answer}"}, 1300),
        ("sst2_dev.tsv", {"columns": ("s", "l"), "prompt_template": "{s}:", "completion_template": " {l}"}, 872),
    ],
)
def test_real_files_are_read(shared_data, tokenizer, name, options, least):
    """Alpaca, gsm8k and SST-2 as they were published: the rows that are left out are named, no other is lost."""
    path = shared_data / "sft" / name
    settings = SftConfig.model_validate({"data": path, "seq_len": 4000, **options})
    rows = read_examples([path], tokenizer, settings)
    assert len(rows.examples) >= least
    assert len(rows.examples) + len(rows.bad) + len(rows.too_long) == rows.num_rows
    assert {fault.kind for fault in rows.bad} <= {"empty_answer"}

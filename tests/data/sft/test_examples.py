"""From files to examples: every fault with its line, every choice of the user kept, equal rows on one side."""

import json

import numpy as np
import pytest
import tokenizers

from entrenar.data import SftConfig, Tokenizer, accept, read_examples, split, total_tokens
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
    assert "1 row longer than seq_len = 40 left out" in notes
    assert f"1 duplicate row ({file}:4 is {file}:1)" in notes
    assert "2 rows cannot be used: 1 empty_answer, 1 broken" in notes


def test_rows_of_a_json_file_in_one_line_are_told_apart(tokenizer, tmp_path):
    """A duplicate and a long row are named by their numbers, for they all stand in line 1."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    rows = read_examples([path], tokenizer, config(path))
    notes = "\n".join(rows.notes(config(path)))
    assert f"1 row longer than seq_len = 40 left out ({path}:1 (row 5) …)" in notes
    assert f"1 duplicate row ({path}:1 (row 4) is {path}:1)" in notes


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
    """Equal faults are one line with a count; ten lines are shown and the rest counted."""
    file = tmp_path / "a.jsonl"
    kinds = "".join(json.dumps({"text": "x", letter: 1}) + "\n" for letter in "abcdefghijk")
    file.write_text('{"text": ""}\n' * 3000 + kinds)
    message = (
        rf"(?s)^3011 of 3011 rows .* \(and 2,999 more, the last at {file}:3000\)\n.*\n  … and 2 more faults\nfix them"
    )
    with pytest.raises(DataError, match=message):
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
        with pytest.raises(DataError, match=f"no row of {file} can be used: {reason}"):
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


CHAT = (
    "{% if tools %}<|bos|>tools {{ tools | tojson }}<|eos|>{% endif %}"
    "{% if documents %}{% for d in documents %}<|bos|>{{ d.title }}<|eos|>{% endfor %}{% endif %}"
    "{% for m in messages %}<|bos|>{{ m.role }}\n{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endif %}{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.function | tojson }}]{% endfor %}{% endif %}"
    "<|eos|>{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
THOUGHT = {"role": "assistant", "content": "Yes", "reasoning_content": "the cat"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "number"}}}]


def with_template(tokenizer, template):
    return Tokenizer(dict(tokenizer.content), {**tokenizer.config, "chat_template": template})


def theirs(tokenizer, template, messages, **given):
    """Return the ids that transformers gives a conversation."""
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer.from_str(json.dumps(dict(tokenizer.content)))
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    return other.apply_chat_template(messages, **given, return_dict=False)


def one_row(tmp_path, tokenizer, fields, **options):
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(fields) + "\n")
    return read_examples([path], tokenizer, SftConfig.model_validate({"data": path, "seq_len": 2000, **options}))


@pytest.mark.parametrize(
    ("fields", "messages", "given"),
    [
        ({"messages": [HI, HELLO]}, None, {}),
        ({"messages": [HI, HELLO], "tools": TOOLS}, None, {"tools": TOOLS}),
        ({"messages": [HI, HELLO], "tools": json.dumps(TOOLS)}, [HI, HELLO], {"tools": TOOLS}),
        ({"messages": [HI, HELLO], "documents": [{"title": "t"}]}, None, {"documents": [{"title": "t"}]}),
        ({"messages": [HI, CALLS, {"role": "tool", "content": "3"}, HELLO]}, None, {}),
        ({"messages": [HI, {**CALLS, "content": "I look"}, {"role": "tool", "content": "3", "name": "add"}, HELLO]},
         None, {}),
        ({"messages": [HI, THOUGHT, HI, HELLO]}, None, {}),
        ({"messages": [PARTS, HELLO]}, None, {}),
        ({"messages": [{"role": "developer", "content": "s"}, HI, HELLO]}, None, {}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"},
         [{"role": "system", "content": "s"}, HI, HELLO], {}),
        ({"conversations": [{"from": "human", "value": "Hi"},
                            {"from": "function_call", "value": json.dumps(CALL["function"])},
                            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Hello"}]},
         [HI, CALLS, {"role": "tool", "content": "3"}, HELLO], {}),
        ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]], "system": "s"},
         [{"role": "system", "content": "s"}, HI, HELLO, HI, HELLO], {}),
    ],
)  # fmt: skip
def test_the_fields_of_a_row_give_the_ids_of_transformers(fields, messages, given, tokenizer, tmp_path):
    """tools, calls, documents, reasoning, parts and systems are in the tokens as `apply_chat_template` has them."""
    rows = one_row(tmp_path, with_template(tokenizer, CHAT), fields)
    assert not rows.bad
    assert rows.examples[0].ids.tolist() == theirs(tokenizer, CHAT, messages or fields["messages"], **given)


BARE = "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>{% endfor %}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [HI, HELLO], "tools": TOOLS}, "tools"),
        ({"messages": [HI, HELLO], "documents": [{"title": "t"}]}, "documents"),
        ({"messages": [HI, {**CALLS, "content": "I look"}, HELLO]}, "tool_calls"),
        ({"messages": [HI, THOUGHT]}, "reasoning_content"),
    ],
)
@pytest.mark.parametrize("template", [BARE, None])
def test_what_a_template_would_drop_is_refused_by_name(fields, name, template, tokenizer, tmp_path):
    """A template that does not read a field drops it in silence; the user may say that this is meant."""
    chat = with_template(tokenizer, template) if template else tokenizer
    (fault,) = one_row(tmp_path, chat, fields).bad
    assert fault.reason.startswith(f"{name} is not read by the chat template, so training would drop it")
    assert len(one_row(tmp_path, chat, fields, ignore_fields=[name]).examples) == 1


def trained_text(rows, tokenizer):
    (example,) = rows.examples
    return tokenizer.decode(example.ids[example.is_trained], skip_special=False)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}])
@pytest.mark.parametrize("template", [CHAT, None])
def test_marked_answers_are_read_and_not_trained(mark, template, tokenizer, tmp_path):
    """In a chat template and without one, for all answers, the last one, or everything."""
    chat = with_template(tokenizer, template) if template else tokenizer
    row = {"messages": [HI, {"role": "assistant", "content": "BAD", **mark}, HI, {**HELLO, "weight": 1}]}
    for train_on in ("answers", "last", "all"):
        rows = one_row(tmp_path, chat, row, train_on=train_on)
        assert "BAD" in tokenizer.decode(rows.examples[0].ids)
        assert "BAD" not in trained_text(rows, tokenizer)
        assert "Hello<|eos|>" in trained_text(rows, tokenizer)
        assert ("Hi" in trained_text(rows, tokenizer)) is (train_on == "all")


def test_rejected_answers_are_counted_and_never_trained(tokenizer, tmp_path):
    """Kahneman-Tversky rows with a false label are left out, which is said, and is no fault."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**row("q", f"a{n}"), "label": n % 2 == 0}) + "\n" for n in range(4)))
    rows = read_examples([path], tokenizer, config(path))
    assert [example.place for example in rows.examples] == [f"{path}:1", f"{path}:3"]
    assert f"2 rows left out: label marks it as not trained ({path}:2 …)" in "\n".join(rows.notes(config(path)))


def test_fields_that_no_template_reads_are_named(tokenizer, tmp_path):
    """A user's own templates choose fields; names of speakers are only links."""
    given = {"prompt_template": "{q}", "completion_template": " {a}"}
    rows = one_row(tmp_path, tokenizer, {"q": "x", "a": 1, "id": 7}, **given)
    assert "fields that the templates do not read: id (1 row)" in "\n".join(rows.notes(config("f", **given)))
    chat = with_template(tokenizer, BARE)
    rows = one_row(tmp_path, chat, {"messages": [{**HI, "name": "Tom"}, HELLO]})
    assert "do not read: name (1 row)" in "\n".join(rows.notes(config("f")))


def test_control_tokens_in_text_are_said(tokenizer, tmp_path):
    """Text that was rendered before spells control tokens, which stay text."""
    rows = one_row(tmp_path, tokenizer, {"text": "<|bos|>[INST] Hi [/INST] Hello<|eos|>"})
    assert "1 row spells control tokens, which are read as plain text (<|bos|> in" in "\n".join(rows.notes(config("f")))


def test_a_fault_of_a_file_is_not_one_bad_row(tokenizer, tmp_path):
    """Quarantine takes rows; where the rest of a file was not read, the run stops."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row("q", "a")] * 3)[:-1] + "],")
    settings = config(path, bad_rows="quarantine")
    with pytest.raises(DataError, match=r"(?s)another value begins here.*the rest of this file was not read"):
        accept(read_examples([path], tokenizer, settings), settings, tmp_path / "q")


def test_names_that_a_table_lacks_are_explained(tokenizer, tmp_path):
    """Where the first row was taken for names, every row has no known shape."""
    path = tmp_path / "a.csv"
    path.write_text("the cat,sat\nthe dog,ran\n")
    (fault,) = read_examples([path], tokenizer, config(path)).bad
    assert "the first line of a table names its columns: if it is a row" in fault.reason


@pytest.mark.parametrize("levels", [100, 400, 990])
def test_a_row_that_is_nested_too_deeply_is_a_bad_row(tokenizer, tmp_path, levels):
    """However deep, it costs itself and no other, and is written to quarantine."""
    deep = '{"a":' * levels + "1" + "}" * levels
    talk = '"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"tools": [{deep}], {talk}}}\n{{{talk}}}\n')
    reader = with_template(tokenizer, "{{ tools }}{% for m in messages %}{{ m.content }};{% endfor %}")
    chosen = config(path, bad_rows="quarantine", seq_len=4096)
    rows = read_examples([path], reader, chosen)
    assert len(rows.bad) + len(rows.examples) == 2
    assert len(accept(rows, chosen, tmp_path / "quarantine.jsonl")) >= 1
    if levels == 990:
        assert rows.bad[0].kind == "broken"
        assert str(rows.bad[0]).startswith(f"{path}:1: ")

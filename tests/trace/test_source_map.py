"""Generated lines are traced to the line that a person wrote, in every format of map; a broken map is refused."""

import json
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.errors import FormatError
from entrenar.trace.records import Frame, SystemCall
from entrenar.trace.source_map import Origin, SourceMap, label, load_map, merged
from entrenar.trace.vlq import decode

AS_CODED = {
    "version": 1,
    "source_language": "python",
    "source_file": "finetune.py",
    "generated_file": "finetune_rs.rs",
    "mappings": [
        {"rust_line": 10, "rust_function": "load_dataset", "python_line": 42, "python_function": "load_dataset",
         "python_context": "rows = read(path)"},
        {"rust_line": 20, "rust_function": "train_loop", "python_line": 89, "python_function": "train_loop",
         "python_context": "loss = step(batch)"},
    ],
    "function_map": {"_cse_temp_0": "temporary for: len(data) > 0"},
}  # fmt: skip
AS_DOCUMENTED = {
    "version": 1,
    "source_language": "python",
    "target_language": "rust",
    "mappings": [
        {"generated_file": "finetune_rs.rs", "generated_line": 10, "original_file": "finetune.py", "original_line": 42,
         "original_function": "load_dataset"},
        {"generated_file": "finetune_rs.rs", "generated_line": 20, "original_file": "finetune.py", "original_line": 89,
         "original_function": "train_loop",
         "transpiler_decision": {"optimization": "inline", "reasoning": "body < 10 lines"}},
    ],
}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Write a map and load it."""

    def load(content, name="out.map.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_map(path)

    return load


# ---- version 1 ----


@pytest.mark.parametrize("content", [AS_CODED, AS_DOCUMENTED], ids=["as coded", "as documented"])
def test_both_forms_of_version_1_are_read(load, content):
    """The Rust tool's code and its book differ; both give the specification's own line."""
    maps = load(content)
    assert str(maps.origin("finetune_rs.rs", 10)) == "[finetune.py:42 in load_dataset]"
    assert str(maps.origin("/build/finetune_rs.rs", 20)) == "[finetune.py:89 in train_loop]"


def test_a_line_belongs_to_the_nearest_entry_above(load):
    """One line of a source makes several; above the first entry there is none."""
    maps = load(AS_CODED)
    assert maps.origin("finetune_rs.rs", 19).line == 42
    assert maps.origin("finetune_rs.rs", 9) is None
    assert maps.origin("other.rs", 10) is None


def test_the_first_of_two_entries_for_a_line_counts(load):
    """As in the Rust tool."""
    twice = AS_CODED | {"mappings": [*AS_CODED["mappings"], {"rust_line": 10, "python_line": 1}]}
    assert load(twice).origin("finetune_rs.rs", 10).line == 42


def test_a_frame_is_moved_and_keeps_the_generated_place(load):
    """The frame of a trace shows the source, and where it was found."""
    maps = load(AS_CODED)
    frame = Frame("load_dataset_impl", "/build/finetune_rs.rs", 12)
    assert maps.move(frame) == Frame("load_dataset", "finetune.py", 42, generated="/build/finetune_rs.rs:12")
    assert maps.move(Frame("f", "other.py", 3)) == Frame("f", "other.py", 3)


def test_a_row_of_the_hot_paths_names_the_definition(tmp_path):
    """Section 4.5's form, with the line of the definition where the source can be read."""
    source = tmp_path / "finetune.py"
    source.write_text("import os\n\n\nasync def load_dataset(path):\n    pass\n")
    assert label("load_dataset", str(source), 42) == "load_dataset (Python:finetune.py:4)"
    assert label("load", str(source), 42) == "load (Python:finetune.py:42)"
    assert label("load", "gone/app.rs", 35) == "load (Rust:app.rs:35)"
    assert label("<module>", "train.ipynb#cell3", 2) == "<module> (Python:train.ipynb#cell3:2)"


def test_every_frame_of_a_call_is_moved(load):
    """The stack of a system call, frame by frame; the rest of the call stays."""
    inner, outer = Frame("read_impl", "finetune_rs.rs", 11), Frame("main", "main.py", 3)
    call = SystemCall("read", 1, 1, 0, 5, stack=(inner, outer))
    (moved, again) = load(AS_CODED).moved([call, call])
    assert [(frame.file, frame.line) for frame in moved.stack] == [("finetune.py", 42), ("main.py", 3)]
    assert moved == again
    assert (moved.name, moved.duration_ns) == ("read", 5)


def test_a_function_without_a_name_in_the_entry_takes_the_function_map(load):
    """`function_map` says what a generated name was."""
    nameless = {"rust_line": 1, "python_line": 7, "python_function": ""}
    maps = load(AS_CODED | {"mappings": [nameless]})
    assert maps.move(Frame("_cse_temp_0", "finetune_rs.rs", 1)).function == "temporary for: len(data) > 0"


def test_a_decision_is_told(load):
    """The note carries what the generator says of the line."""
    assert load(AS_DOCUMENTED).origin("finetune_rs.rs", 20).note == "inline (body < 10 lines)"


def test_files_are_told_apart_by_their_path(load):
    """Two generated files of one name: the longer match wins; where both match, none is guessed."""
    entries = [
        {"generated_file": name, "generated_line": 1, "original_file": source, "original_line": 5}
        for name, source in (("a/out.py", "a.py"), ("b/out.py", "b.py"))
    ]
    maps = load(AS_DOCUMENTED | {"mappings": entries})
    assert maps.origin("/x/b/out.py", 1).file == "b.py"
    assert maps.origin("/x/out.py", 1) is None


def test_a_generated_file_next_to_its_map_is_that_file_only(load, tmp_path):
    """`out/finetune.py`, made from `finetune.py`, does not claim the frames of its source."""
    (tmp_path / "finetune.py").write_text("pass\n")
    maps = load(AS_CODED | {"generated_file": "finetune.py", "source_file": "src/finetune.py"})
    assert maps.origin(str(tmp_path / "finetune.py"), 10).line == 42
    assert maps.origin("/elsewhere/src/finetune.py", 10) is None


# ---- chains and circles ----


def entry_map(*hops: tuple[str, str]) -> SourceMap:
    maps = SourceMap("python")
    for generated, original in hops:
        maps.add(generated, 1, Origin(original, 1, f"in_{original}"))
    return maps


def test_a_chain_is_followed_to_its_end():
    """A notebook, exported, then transpiled."""
    maps = merged([("one", entry_map(("c.rs", "b.py"))), ("two", entry_map(("b.py", "a.ipynb#cell1")))])
    assert maps.origin("c.rs", 1) == Origin("a.ipynb#cell1", 1, "in_a.ipynb#cell1")


@pytest.mark.parametrize(
    ("hops", "circle"),
    [([("a", "a")], "a -> a"), ([("a", "b"), ("b", "a")], "a -> b -> a"),
     ([("a", "b"), ("b", "c"), ("c", "b")], "b -> c -> b")],
)  # fmt: skip
def test_a_circle_is_refused(hops, circle):
    """No line of it was written by a person."""
    with pytest.raises(FormatError, match=f"they go round: {circle}"):
        merged([(f"map {index}", entry_map(hop)) for index, hop in enumerate(hops)])


def test_a_map_to_itself_is_refused_as_it_is_read(load):
    """A single map can be a circle, too."""
    with pytest.raises(FormatError, match="they go round"):
        load(AS_CODED | {"source_file": "finetune_rs.rs"})


def test_maps_that_disagree_are_refused():
    """Which of two builds ran is not guessed; the same twice is no fault."""
    merged([("one", entry_map(("c", "a"))), ("two", entry_map(("c", "a")))])
    with pytest.raises(FormatError, match=r"must agree on a line: two says \[b:1 in in_b\] for c:1"):
        merged([("one", entry_map(("c", "a"))), ("two", entry_map(("c", "b")))])


# ---- version 3 ----

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def encode(numbers) -> str:
    text = ""
    for number in numbers:
        rest = -number << 1 | 1 if number < 0 else number << 1
        while True:
            rest, digit = rest >> 5, rest & 31
            text += DIGITS[digit | (32 if rest else 0)]
            if not rest:
                break
    return text


def version_3(lines: list[list[tuple[int, int, int]]], sources: list[str]) -> dict:
    """A map of segments (column, source, line), all counted from 0."""
    source = source_line = 0
    encoded = []
    for segments in lines:
        column = 0
        words = []
        for to_column, to_source, to_line in segments:
            words.append(encode([to_column - column, to_source - source, to_line - source_line, 0]))
            column, source, source_line = to_column, to_source, to_line
        encoded.append(",".join(words))
    return {"version": 3, "file": "out.py", "sources": sources, "names": [], "mappings": ";".join(encoded)}


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1)))
def test_numbers_round_trip(numbers):
    """Every 32-bit number is read as it was written."""
    assert decode(encode(numbers)) == numbers


segments = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 2), st.integers(0, 5000)), max_size=4, unique_by=lambda s: s[0]
)


@pytest.mark.skipif(shutil.which("node") is None, reason="the oracle for version 3 is Node's own reader")
@settings(max_examples=5, deadline=None)
@given(st.lists(st.lists(segments.map(sorted), min_size=1, max_size=30), min_size=5, max_size=5))
def test_version_3_is_read_as_node_reads_it(tmp_path_factory, many):
    """The first segment of each line, in Node's reading and in ours."""
    folder = tmp_path_factory.mktemp("maps")
    program = """
        const {SourceMap} = require('module'), fs = require('fs');
        const answer = JSON.parse(fs.readFileSync(0)).map(([map, asked]) => {
            const read = new SourceMap(map);
            return asked.map(([line, column]) => {
                const e = read.findEntry(line, column); return [e.originalSource, e.originalLine + 1];
            });
        });
        console.log(JSON.stringify(answer));
    """
    questions = []
    for lines in many:
        asked = [[number, segments[0][0]] for number, segments in enumerate(lines) if segments]
        questions.append((version_3(lines, ["a.py", "lib/b.py", "c.py"]), asked))
    done = subprocess.run(
        ["node", "-e", program], input=json.dumps(questions), capture_output=True, text=True, check=True
    )
    for (content, asked), answers in zip(questions, json.loads(done.stdout), strict=True):
        path = folder / "out.py.map"
        path.write_text(json.dumps(content))
        maps = load_map(path)
        for (number, _), answer in zip(asked, answers, strict=True):
            origin = maps.origin("out.py", number + 1)
            assert [origin.file, origin.line] == answer


def test_version_3_has_sections_roots_and_holes(load):
    """Sections are offset by lines; a root goes before each source; a segment without a source maps to none."""
    one = version_3([[(0, 0, 4)]], ["a.py"]) | {"sourceRoot": "src"}
    hole = {"version": 3, "sources": [None, "b.py"], "names": [], "mappings": "A;ACAA;AAAA"}
    sections = [
        {"offset": {"line": 0, "column": 0}, "map": one},
        {"offset": {"line": 10, "column": 0}, "map": hole},
    ]
    content = {"version": 3, "file": "out.py", "sections": sections}
    maps = load(")]}'\n" + json.dumps(content), "out.py.map")
    assert maps.origin("out.py", 5) == Origin("src/a.py", 5)
    assert maps.origin("out.py", 11) is None
    assert maps.origin("out.py", 12) == Origin("b.py", 1)


@pytest.mark.skipif(shutil.which("esbuild") is None, reason="esbuild is not installed")
def test_esbuilds_map_is_read(tmp_path):
    """A map that a real bundler wrote leads to the lines of the source."""
    (tmp_path / "in.ts").write_text(
        "interface A { x: number }\n\nfunction f(a: A) {\n  return a.x;\n}\nconsole.log(f);\n"
    )
    subprocess.run(["esbuild", "in.ts", "--sourcemap", "--outfile=out.js"], cwd=tmp_path, check=True)
    maps = load_map(tmp_path / "out.js.map")
    lines = (tmp_path / "out.js").read_text().splitlines()
    number = next(index for index, text in enumerate(lines, 1) if "return" in text)
    assert maps.origin(str(tmp_path / "out.js"), number).line == 4


# ---- broken maps ----


def without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


V3 = {"version": 3, "file": "out.py", "sources": ["a.py"], "names": [], "mappings": "AAAA"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{ not json", "must be a source map in JSON"),
        ("[" * 100_000, "must be a source map in JSON"),
        ([], "a source map must be an object, got []"),
        ({}, "version must be a whole number, it is missing"),
        (AS_CODED | {"version": 2}, "version must be 1 or 3, got 2"),
        (AS_CODED | {"version": True}, "version must be a whole number, got True"),
        (without(AS_CODED, "source_language"), "source_language must be a string, it is missing"),
        (without(AS_CODED, "source_file"), "source_file must be a string, it is missing"),
        (without(AS_CODED, "mappings"), "mappings must be a list, it is missing"),
        (AS_CODED | {"mappings": [3]}, "mappings[0] must be an object, got 3"),
        (AS_CODED | {"mappings": [{"rust_line": 0, "python_line": 1}]}, "mappings[0].rust_line must be >= 1, got 0"),
        (
            AS_CODED | {"mappings": [{"rust_line": 1, "python_line": "x"}]},
            "python_line must be a whole number, got 'x'",
        ),
        (
            AS_CODED | {"mappings": [{"generated_file": "a"}]},
            "mappings[0].original_file must be a string, it is missing",
        ),
        (AS_CODED | {"function_map": []}, "function_map must be an object, got []"),
        (V3 | {"mappings": "A!"}, "mappings, line 1: '!' is no base-64 digit"),
        (V3 | {"mappings": ";AAAg"}, "mappings, line 2: 'AAAg' ends inside a number"),
        (V3 | {"mappings": "AAA//////////"}, "holds a number beyond 32 bits"),
        (V3 | {"mappings": "AA"}, "a segment must have 1, 4 or 5 numbers, 'AA' has 2"),
        (V3 | {"mappings": "ACAA"}, "line 1: source 1 does not exist, there are 1"),
        (V3 | {"mappings": "AADA"}, "the line of a source must be >= 0, got -1"),
        ({"version": 3, "sections": [{"offset": {"line": 0}, "url": "x"}]}, "sections[0].map must be an object"),
    ],
)
def test_a_broken_map_is_refused(load, content, message):
    """File, field, rule and value are named."""
    with pytest.raises(FormatError, match=re.escape(message)) as refused:
        load(content)
    assert "out.map.json" in str(refused.value)


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    fields = ["version", "mappings", "sources", "sections", "offset", "map", "file", "line"]
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(fields), inner)


@settings(max_examples=100)
@given(st.recursive(st.none() | st.integers() | st.text(), nested, max_leaves=10), st.sampled_from([1, 3]))
def test_no_content_breaks_the_reader(tmp_path_factory, content, version):
    """Anything in JSON is read, or refused with our own error."""
    path = tmp_path_factory.getbasetemp() / "any.map"
    path.write_text(json.dumps(content | {"version": version} if isinstance(content, dict) else content))
    try:
        load_map(path)
    except FormatError as error:
        assert "any.map" in str(error)  # noqa: PT017 - either outcome is right

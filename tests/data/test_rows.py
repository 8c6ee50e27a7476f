"""Rows with their places, from every kind of file; a broken row is told, not thrown."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data.row import BadRow, Row
from entrenar.data.rows import read_rows
from entrenar.errors import DataError


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_rows_have_their_lines(tmp_path):
    """Blank lines count; a broken line and one that is no object are bad rows of their own."""
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": \n[1]\n{"a": 2}\n')
    first, broken, listed, last = read_rows(path)
    assert first == Row(f"{path}:1", {"a": 1})
    assert last == Row(f"{path}:5", {"a": 2})
    assert isinstance(broken, BadRow)
    assert str(broken).startswith(f"{path}:3: not valid JSON")
    assert str(listed) == f"{path}:4: a row must be a JSON object, got list"


@pytest.mark.parametrize("indent", [None, 2])
def test_json_rows_have_their_lines(tmp_path, indent):
    """An element's place is the line it begins on, and its number where another begins on the same line."""
    values = [{"text": "one\ntwo"}, {"text": "x"}, {"text": ""}]
    path = write(tmp_path, "a.json", "\n" + json.dumps(values, indent=indent))
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == values
    lines = path.read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip() == "{"]
    starts = numbers if indent else [2, "2 (row 2)", "2 (row 3)"]
    assert [row.place for row in rows] == [f"{path}:{line}" for line in starts]


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ('[{"a": 1},\n {"a": }]', 1, ":2: not valid JSON"),
        ('[{"a": 1}\n {"a": 2}]', 1, ":2: not valid JSON: no comma or ] before this place"),
        ('[{"a": 1}', 1, ":1: not valid JSON: no comma or ] before this place"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, ":2: another value begins here, and would be dropped"),
        ('{"a": 1}\n{"a": 2}\n[{"a": 3}]', 2, ":3: another value begins here, and would be dropped"),
        ('{"data": [{"a": 1}],\n "version": 2}', 1, ":1: the object around the list holds more than the list"),
        ('[{"a": 1, "a": 2}]', 0, ":1: the key 'a' occurs twice, so one of its values would be lost"),
        ('["a"]', 0, ":1: a row must be a JSON object, got str"),
        ("", 0, ":1: the file must hold a JSON list of rows"),
    ],
)
def test_a_broken_json_file_keeps_the_rows_before(tmp_path, text, good, message):
    """What comes before the fault is read, and the fault has its line."""
    rows = list(read_rows(write(tmp_path, "a.json", text)))
    assert [type(row) for row in rows] == [Row] * good + [BadRow]
    assert message in str(rows[-1])


def test_tables_have_named_columns(tmp_path):
    """A csv file takes its names from the first line and quotes; tsv has no quotes, and `columns` name it."""
    table = write(tmp_path, "a.csv", 'q,a\n"one\nline",1\ntwo,2\nthree\n')
    rows = list(read_rows(table))
    assert rows[:2] == [Row(f"{table}:2", {"q": "one\nline", "a": "1"}), Row(f"{table}:4", {"q": "two", "a": "2"})]
    assert str(rows[2]) == f"{table}:5: 1 cells where there are 2 columns (q, a)"
    tabs = write(tmp_path, "a.tsv", '"quoted" start\t1\n')
    assert list(read_rows(tabs, ("s", "l"))) == [Row(f"{tabs}:1", {"s": '"quoted" start', "l": "1"})]


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ('q,a\n1,2\n3,"4\n5,6\n', 1, ":3: a quotation mark opens in this row and is never closed; the rest of"),
        ("q,a,a\n1,2,3\n", 0, ":1: two columns have the name 'a', so one of them would be lost"),
        ("q;a\n1;2\n", 0, ":1: the first line has one column, 'q;a': the cells are separated by semicolons"),
        ('q,a\n1,"2" 3\n', 0, ":2: ',' expected after '\"'"),
        ("q,a\n1,2\n3,\xe9\n", 1, ":3: not UTF-8: byte 0xe9"),
    ],
)
def test_a_fault_of_a_table_ends_the_file(tmp_path, text, good, message):
    """Rows before the fault are read, and the fault says that the rest is not."""
    rows = list(read_rows(write(tmp_path, "a.csv", text.encode("latin-1"))))
    assert [type(row) for row in rows] == [Row] * good + [BadRow]
    assert message in str(rows[-1])
    assert rows[-1].ends_file


def test_a_first_line_that_repeats_the_given_names_is_no_row(tmp_path):
    """Names that are given for a file with names of its own would train on them."""
    (row,) = read_rows(write(tmp_path, "a.csv", "q,a\n1,2\n"), ("q", "a"))
    assert row.ends_file
    assert "the line repeats the names that columns gives" in row.reason


def test_long_cells_are_read_and_longer_rows_are_faults(tmp_path, monkeypatch):
    """A cell may be longer than csv's own limit; a row beyond ours ends a table, and is one row of jsonl."""
    (row,) = read_rows(write(tmp_path, "a.tsv", "a\n" + "x" * 200_000 + "\n"))
    assert len(row.fields["a"]) == 200_000
    for module in ("json_rows", "table_rows"):
        monkeypatch.setattr(f"entrenar.data.{module}.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("entrenar.data.json_rows._CHUNK_BYTES", 64)
    long = json.dumps({"a": "x" * 5000})
    good, bad, last = read_rows(write(tmp_path, "a.jsonl", f'{{"a": 1}}\n{long}\n{{"a": 2}}\n'))
    assert (good.fields, bad.place, last.place) == ({"a": 1}, f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:3")
    good, bad = read_rows(write(tmp_path, "a.json", f'[{{"a": 1}},\n{long}, {{"a": 2}}]'))
    assert bad.ends_file
    assert str(bad).startswith(f"{tmp_path}/a.json:2: the row is larger than")
    good, bad = read_rows(write(tmp_path, "b.tsv", "a\n1\n" + "x" * 5000 + "\n2\n"))
    assert bad.ends_file


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 18])
def test_json_is_read_in_pieces_as_it_is_whole(tmp_path, monkeypatch, chunk):
    """Values, lines and letters may be cut anywhere between two reads."""
    monkeypatch.setattr("entrenar.data.json_rows._CHUNK_BYTES", chunk)
    values = [{"text": "naïve 漢字 🙂", "n": number, "list": [1.5, None, {"a": []}]} for number in range(20)]
    for name, text in {
        "list": json.dumps(values, ensure_ascii=False, indent=1),
        "lines": "\n".join(json.dumps(value, ensure_ascii=False) for value in values),
        "wrapped": json.dumps({"data": values}),
    }.items():
        rows = list(read_rows(write(tmp_path, f"{name}.json", text)))
        assert [row.fields for row in rows] == values, name
        lines = text.split("\n")
        starts = [
            number for number, line in enumerate(lines, 1) if line.startswith((" {", '{"text')) and "list" in name
        ]
        assert not starts or [int(row.place.rsplit(":")[-1]) for row in rows] == starts


def test_packed_files_and_lists_in_jsonl_are_read(tmp_path):
    """.gz is unpacked as it is read; a damaged one ends; a .jsonl that holds a list is one."""
    for name, text in {"a.jsonl": '{"a": 1}\n{"a": 2}', "a.json": '[{"a": 1}, {"a": 2}]', "a.csv": "a\n1\n2\n"}.items():
        packed = gzip.compress(text.encode())
        rows = list(read_rows(write(tmp_path, f"{name}.gz", packed)))
        assert [int(row.fields["a"]) for row in rows] == [1, 2]
        *_, last = read_rows(write(tmp_path, f"{name}.gz", packed[:-9]))
        assert isinstance(last, BadRow)
        assert last.ends_file
    listed = list(read_rows(write(tmp_path, "b.jsonl", '\n [{"a": 1},\n{"a": 2}]')))
    assert listed == [Row(f"{tmp_path}/b.jsonl:2", {"a": 1}), Row(f"{tmp_path}/b.jsonl:3", {"a": 2})]


def test_a_parquet_row_beyond_the_limit_is_a_fault(tmp_path, monkeypatch):
    """Rows are limited in bytes as lines are; those before and behind it are read."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("entrenar.data.table_rows.MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", "x" * 5000, "two"], "n": [1, 2, 3]}), path)
    first, large, last = read_rows(path)
    assert (first.fields, last.fields) == ({"text": "one", "n": 1}, {"text": "two", "n": 3})
    assert (large.place, large.kind, large.ends_file) == (f"{path}:2", "broken", False)
    assert "the row is larger than" in large.reason


def test_parquet_rows_are_numbered(tmp_path):
    """A parquet file has no lines; its rows count from 1."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert list(read_rows(path))[1] == Row(f"{path}:2", {"text": "two", "n": 2})
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="is not a readable parquet file"):
        list(read_rows(path))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    """The line is told, and the others are read; a byte order mark is no fault, one of UTF-16 is."""
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}\n')
    first, row, last = read_rows(path)
    assert (first.fields, last.place) == ({"a": 1}, f"{path}:3")
    assert str(row).startswith(f"{path}:2: not UTF-8: byte 0xe9; convert the file")
    for name, text in {"b.jsonl": '{"a": "1"}', "b.json": '[{"a": "1"}]', "b.csv": "a\n1\n"}.items():
        (marked,) = read_rows(write(tmp_path, name, text.encode("utf-8-sig")))
        assert marked.fields == {"a": "1"}
        (wide,) = read_rows(write(tmp_path, name, text.encode("utf-16")))
        assert "not UTF-8 but UTF-16; convert the file" in str(wide)


def test_files_of_no_use_are_refused(tmp_path):
    """A missing file, an unknown kind, and columns for a file that names its own."""
    with pytest.raises(DataError, match="does not exist; give a file of rows"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"must be a \.jsonl, .* or \.tsv file, or such a text as \.gz"):
        read_rows(tmp_path / "no.txt")
    with pytest.raises(DataError, match="columns names those of csv and tsv files"):
        read_rows(write(tmp_path, "a.jsonl", ""), ("a",))


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r\n", b"\t", b" ", b'{"a": 1}', b'"a"', b"1", b"null", b"\xff",
     b"\xef\xbb\xbf", b"\x00", b"\\u", b"\\", b"a,b", b'{"data": [', b"\xc3\xa9", b"1e999", b"NaN"]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.lists(PIECES, max_size=12).map(b"".join) | st.binary(max_size=30), packed=st.booleans())
def test_any_bytes_are_rows_or_faults_with_a_place(tmp_path, data, packed):
    """Whatever a file holds, nothing but rows and faults comes out, and only the last fault may end the file."""
    for kind in (".jsonl", ".json", ".csv", ".tsv"):
        path = write(tmp_path, f"a{kind}{'.gz' if packed else ''}", gzip.compress(data) if packed else data)
        rows = list(read_rows(path))
        assert all(row.place.startswith(f"{path}:") for row in rows)
        assert not any(row.ends_file for row in rows[:-1] if isinstance(row, BadRow))

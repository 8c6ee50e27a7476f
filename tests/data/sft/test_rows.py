"""Rows with their places, from every kind of file; a broken row is told, not thrown."""

import json

import pytest

from entrenar.data.sft.rows import BadRow, Row, read_rows
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
        ('[{"a": 1}\n {"a": 2}]', 1, ":1: not valid JSON: no comma or ] after this row"),
        ('[{"a": 1}', 1, ":1: not valid JSON: no comma or ] after this row"),
        ('{"a": 1}', 0, ":1: the file must hold a JSON list of rows"),
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


def test_a_cell_that_is_too_large_is_a_bad_row(tmp_path):
    """The csv reader's own limit ends the file with a place."""
    path = write(tmp_path, "a.tsv", "a\n" + "x" * 200_000 + "\n")
    (row,) = read_rows(path)
    assert "field larger than field limit" in str(row)
    assert row.place == f"{path}:2"


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
    """The line of the first wrong byte is told; a byte order mark is no fault."""
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n')
    (row,) = read_rows(path)
    assert str(row).startswith(f"{path}:2: not UTF-8: byte 0xe9; convert the file")
    (marked,) = read_rows(write(tmp_path, "b.jsonl", b'\xef\xbb\xbf{"a": 1}'))
    assert marked.fields == {"a": 1}


def test_files_of_no_use_are_refused(tmp_path):
    """A missing file, an unknown kind, and columns for a file that names its own."""
    with pytest.raises(DataError, match="does not exist; give a file of rows"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"must be a \.jsonl, \.json, \.parquet, \.csv or \.tsv file"):
        read_rows(tmp_path / "no.txt")
    with pytest.raises(DataError, match="columns names those of csv and tsv files"):
        read_rows(write(tmp_path, "a.jsonl", ""), ("a",))


def test_a_file_of_a_gigabyte_is_refused(tmp_path):
    """A file that would fill the memory is told to be split."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate((1 << 30) + 1)
    with pytest.raises(DataError, match="larger than 1,073,741,824 bytes; split it"):
        read_rows(path)

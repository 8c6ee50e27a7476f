"""`entrenar.data.corpus.sources`: documents come out of files, folders and rows; what is no text is named."""

import builtins
import gzip
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from entrenar.data.corpus.settings import SourceConfig
from entrenar.data.corpus.sources import ReadLog, find_sources, read_documents
from entrenar.errors import DataError


def _read(*names: Path | str, log: ReadLog | None = None, **options: Any) -> list[str]:
    config = SourceConfig.model_validate(options)
    log = log or ReadLog()
    sources = find_sources([str(name) for name in names], config)
    return [text for source in sources for file in source.files for text in read_documents(file, config, log)]


def test_a_text_file_is_one_document(tmp_path: Path):
    """Its content as it stands, without a byte order mark."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline one\r\nline two\n")
    assert _read(tmp_path / "a.txt") == ["line one\r\nline two\n"]


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.sources", "parts = (pending + content).split(separator)", "parts = content.split(separator)"
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="#\0\ufeff"), max_size=60), max_size=6
    ),
    st.sampled_from(["#", "##", "#é#\n"]),
    st.integers(1, 9),
)
def test_separated_documents_come_back(tmp_path: Path, documents: list[str], separator: str, block_bytes: int):
    """Whatever the blocks of reading are, documents are what stands between separators, without outer line ends."""
    path = tmp_path / "text.txt"
    path.write_text(separator.join(documents), "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entrenar.data.corpus.sources._BLOCK_BYTES", block_bytes)
        found = _read(path, document_separator=separator)
    stripped = [document.strip("\r\n") for document in documents]
    assert found == [document for document in stripped if document and not document.isspace()]


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.sources", "pending, offset = pending[end:], offset + end", "pending, offset = b'', offset + end"
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text(st.sampled_from("ab é😀\n"), min_size=1, max_size=300), st.integers(16, 50), st.integers(1, 64))
def test_long_documents_are_cut_without_loss(tmp_path: Path, text: str, limit: int, block_bytes: int):
    """No part is longer than the limit, whole lines stay whole where they fit, and nothing but blank parts is lost."""
    path, log = tmp_path / "text.txt", ReadLog()
    path.write_text(text, "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entrenar.data.corpus.sources._BLOCK_BYTES", block_bytes)
        parts = _read(path, log=log, max_document_bytes=limit)
    assert all(len(part.encode()) <= limit for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert (log.cuts > 0) == (len(text.encode()) > limit)


def test_long_documents_are_cut_at_line_starts(tmp_path: Path):
    """Lines are kept together up to the limit; rows are cut the same way."""
    text = "".join(f"line {number}\n" for number in range(8))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        parts = _read(tmp_path / name, max_document_bytes=20)
        assert parts == [f"line {number}\nline {number + 1}\n" for number in range(0, 8, 2)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_long_line_is_cut_between_characters(tmp_path: Path, name: str):
    """Without a line end to cut at, no character is cut in half."""
    text = "aé😀" * 30
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text, "utf-8")
    parts = _read(tmp_path / name, max_document_bytes=16)
    assert "".join(parts) == text
    assert all(12 < len(part.encode()) <= 16 for part in parts[:-1])


def test_a_folder_gives_its_text_files_sorted_and_names_the_rest(tmp_path: Path):
    """Files without text, hidden ones, links to what is read and files that no pattern matches are named."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    contents = {
        "b.py": b"b",
        "a.py": b"a",
        "sub/c.py": b"c",
        "bin.py": b"x\0y",
        "latin.py": b"caf\xe9",
        "empty.py": b"",
    }
    contents |= {"large.py": b"x" * 200, ".hidden.py": b"h", ".git/d.py": b"d", "notes.md": b"n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    log = ReadLog()
    assert _read(tmp_path, log=log, include=["*.py"], max_file_bytes=100) == ["a", "b", "c"]
    (source,) = find_sources([str(tmp_path)], SourceConfig(include=("*.py",)))
    assert sorted(source.left_out) == [
        ("hidden", ".git/"), ("hidden", ".hidden.py"), ("linked to what is read already", "link.py"),
        ("not matched by include", "notes.md"),
    ]  # fmt: skip
    assert log.skipped_names == {
        "binary": ["bin.py"],
        "not UTF-8": ["latin.py"],
        "empty": ["empty.py"],
        "larger than max_file_bytes": ["large.py"],
    }
    assert "1 binary (bin.py)" in log.skipped_summary()


def test_the_names_of_left_out_files_are_bounded():
    """A million binary files do not fill the memory: names stop, counts go on."""
    log = ReadLog()
    for number in range(50):
        log.skip("binary", f"{number}.bin")
    assert log.skipped_counts == {"binary": 50}
    assert len(log.skipped_names["binary"]) == 20
    assert log.skipped_summary().endswith("19.bin, …)")


def test_stdlib_is_this_pythons_own_source():
    """Its modules are there, its tests and installed packages are not."""
    config = SourceConfig()
    files = find_sources(["stdlib"], config)[0].files
    names = [file.name for file in files]
    assert {"os.py", "json/decoder.py", "argparse.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in f"/{name}" or "/tests/" in f"/{name}"]
    assert names == sorted(names)
    assert all(file.path == Path(sysconfig.get_path("stdlib")) / file.name for file in files)


def test_rows_of_jsonl_json_and_parquet(tmp_path: Path):
    """The named field of each row is a document; blank lines are passed over."""
    rows = [{"body": "first é", "n": 1}, {"body": "second", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert _read(tmp_path / name, text_field="body") == ["first é", "second"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\n\xff\xfe", r"a.txt is not UTF-8: byte 0xff at offset 3; convert it"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"a.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.txt", b"\x89PNG\0\0", r"a.txt is binary, not text: a zero byte at offset 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', r"a.jsonl:2: not UTF-8: byte 0xff"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: a row must be a JSON object, got int"),
        ("a.jsonl", b'{"story": "a", "id": 1}\n', r"a.jsonl:1: no field 'text'; the row has id, story"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: field 'text' must be text, got int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: field 'text' holds a lone surrogate at position 0"),
        ("a.json", b'"text"', r"a.json:1: the file must hold a JSON list of rows, or an object a line"),
        ("a.json", b'[{"text": "a"}, {}]', r"a.json:1 \(row 2\): no field 'text'; the row has none"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', r"a.json:2: another value begins here, and would be dropped"),
        ("a.csv", b'text\n"a\nb\n', r"a.csv:2: a quotation mark opens in this row and is never closed"),
        ("a.parquet", b"PAR1 not really", r"a.parquet is not a readable parquet file"),
    ],
)
def test_each_fault_of_a_named_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    """DataError names the file, the place and the fault."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _read(tmp_path / name)


def test_parquet_columns_are_checked(tmp_path: Path):
    """A missing column lists those there are; a null is named by its row."""
    parquet.write_table(pyarrow.table({"story": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'; it has story"):
        _read(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet:2: field 'text' must be text, got NoneType"):
        _read(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message has the command."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real_import = builtins.__import__

    def without_pyarrow(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(DataError, match=r"reading parquet needs pyarrow; pip install 'entrenar\[parquet\]'"):
        _read(tmp_path / "a.parquet")


def test_missing_and_empty_sources_are_refused(tmp_path: Path):
    """No source, a wrong path, and a folder without a matching file."""
    with pytest.raises(DataError, match="no source given"):
        find_sources([], SourceConfig())
    with pytest.raises(DataError, match="nowhere does not exist; give a file, a folder, or 'stdlib'"):
        find_sources([str(tmp_path / "nowhere")], SourceConfig())
    with pytest.raises(DataError, match=r"has no file that matches \*.py, \*.md"):
        find_sources([str(tmp_path)], SourceConfig(include=("*.py", "*.md")))


def test_a_file_that_vanishes_is_a_data_error(tmp_path: Path):
    """Between listing and reading a file may go; the message names it."""
    (tmp_path / "a.txt").write_text("a")
    config = SourceConfig()
    file = find_sources([str(tmp_path / "a.txt")], config)[0].files[0]
    file.path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a.txt: No such file or directory"):
        list(read_documents(file, config, ReadLog()))


def test_rows_of_a_folder_are_documents_and_the_others_are_named(tmp_path: Path):
    """Each row of each data file, packed or not, by the reader that fine-tuning has; rows without text are counted."""
    for name, content in {
        "a.jsonl": '{"text": "a1"}\n{"text": "a2"}\n{"story": "x"}\n',
        "b.json": '[{"text": "b1"}, {"text": "b2"}]',
        "c.csv": "text,n\nc1,1\nc2,2\n",
        "d.tsv": "n\ttext\n1\td1\n",
        "package.json": '{"name": "x"}',
        "e.txt": "e1",
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "f1"}\n'))
    parquet.write_table(pyarrow.table({"text": ["g1"], "n": [1]}), tmp_path / "g.parquet")
    parquet.write_table(pyarrow.table({"story": ["h1"]}), tmp_path / "h.parquet")
    log = ReadLog()
    assert _read(tmp_path, log=log) == ["a1", "a2", "b1", "b2", "c1", "c2", "d1", "e1", "f1", "g1"]
    assert log.skipped_names["rows without text in 'text'"] == ["a.jsonl:3", "package.json:1"]
    assert log.skipped_counts["rest of a file that cannot be read"] == 1


def test_links_are_followed_once(tmp_path: Path):
    """Files and folders behind links are read; a circle, a second way to a file and a broken link are named."""
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "sub" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.txt").symlink_to(tmp_path / "b.txt")
    (folder / "c.txt").symlink_to(tmp_path / "b.txt")
    (folder / "sub").symlink_to(tmp_path / "real" / "sub")
    (folder / "gone.txt").symlink_to(tmp_path / "gone.txt")
    (folder / "circle").symlink_to(folder)
    (source,) = find_sources([str(folder)], SourceConfig())
    assert [file.name for file in source.files] == ["b.txt", "sub/a.txt"]
    assert sorted(source.left_out) == [
        ("broken links", "gone.txt"), ("linked to what is read already", "c.txt"),
        ("linked to what is read already", "circle/"),
    ]  # fmt: skip


def test_importing_sources_does_not_import_pyarrow():
    """The extra is loaded for a parquet file only."""
    module = sys.modules["entrenar.data.corpus.sources"]
    assert "pyarrow" not in vars(module)

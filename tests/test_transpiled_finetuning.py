"""The page on generated code does what it says: its commands run, and print what it shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.errors import MachineError
from entrenar.trace import backends
from entrenar.trace.reader import Reader

EXAMPLES = Path(__file__).parents[1] / "examples" / "llama2"
PAGE = (EXAMPLES / "transpiled_finetuning.md").read_text(encoding="utf-8")
SECTIONS = PAGE.split("\n## ")[1:]


def blocks(kind: str, text: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def can_trace() -> bool:
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, str]:
    """Run the page from top to bottom; return what each section printed, and all files' folder as the last entry."""
    folder = tmp_path_factory.mktemp("page") / "llama2"
    shutil.copytree(EXAMPLES, folder)
    programs = folder.parent / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    (programs / "entrenar").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m entrenar "$@"\n')
    (programs / "entrenar").chmod(0o755)
    variables = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    printed = {"folder": str(folder)}
    for section in SECTIONS if can_trace() else SECTIONS[:-1]:
        script = "set -euo pipefail\n" + "".join(blocks("bash", section))
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{section.splitlines()[0]}: {done.stderr}"
        printed[section.splitlines()[0]] = done.stdout + done.stderr
    return printed


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_section_prints_what_it_shows(section, ran):
    """Each line of a text block is in what the section's commands printed, or in the log that they wrote."""
    if section.splitlines()[0] not in ran:
        pytest.skip("this machine does not permit ptrace")
    log = (Path(ran["folder"]) / "finetune.decisions.log").read_text()
    out = ran[section.splitlines()[0]] + log
    for block in blocks("text", section):
        for line in filter(None, block.splitlines()):
            pattern = re.sub(r"…|\\…", ".*", re.escape(line))
            assert re.search(rf"^{pattern}$", out, flags=re.MULTILINE), line


def test_every_mapping_points_to_an_existing_line_that_says_the_same(ran):
    """A generated read is a read in the source; no entry leads past the end of the file."""
    folder = Path(ran["folder"])
    source = (folder / "finetune_tiny.py").read_text().splitlines()
    generated = (folder / "generated.py").read_text().splitlines()
    entries = json.loads((folder / "generated.map.json").read_text())["mappings"]
    assert len(entries) >= 40
    for entry in entries:
        written, read = source[entry["original_line"] - 1], generated[entry["generated_line"] - 1]
        for word in ("os.read", "os.write", "os.fsync", "math.exp", "json.loads"):
            assert (word in written) == (word in read), entry


def test_the_unrolled_loop_maps_three_lines_to_one(ran):
    """Many lines of the generated program come from one line."""
    entries = json.loads((Path(ran["folder"]) / "generated.map.json").read_text())["mappings"]
    lines = [entry["generated_line"] for entry in entries if "math.exp" in open_line(ran, entry)]
    assert len(lines) == 3


def open_line(ran, entry) -> str:
    return (Path(ran["folder"]) / entry["original_file"]).read_text().splitlines()[entry["original_line"] - 1]


def test_the_trace_keeps_both_places_and_the_decisions(ran):
    """Frames are at their origin and say where they ran; decisions are marks with their results."""
    if not can_trace():
        pytest.skip("this machine does not permit ptrace")
    with Reader(Path(ran["folder"]) / "generated.sqlite") as reader:
        frames = [frame for call in reader.calls() for frame in call.stack if frame.function == "load_dataset"]
        marks = [mark.text for mark in reader.marks() if mark.kind == "decision"]
    assert frames
    assert {Path(frame.file).name for frame in frames} == {"finetune_tiny.py"}
    assert all(re.search(r"generated\.py:\d+$", frame.generated or "") for frame in frames)
    assert len(marks) == 4
    assert 'optimization::unroll_loop {"line": 30, "rounds": 3} -> {"unrolled": true}' in marks

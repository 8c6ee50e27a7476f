"""What README and book say is so: links lead somewhere, commands exist, tables are those of the raw figures."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from entrenar.cli.main import COMMANDS
from entrenar.config import options
from entrenar.config_file import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files(page):
    """Every relative link and picture of a page is there."""
    targets = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_tables_are_those_of_the_raw_figures(page):
    """Nothing between the marks of a table was written by hand."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_makes_a_page_stale():
    """The check above sees a number that is not the raw one."""
    page = "<!-- table: train_step -->\n| 1000 tokens/s |\n<!-- end -->"
    assert tables.filled(page) != page


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_exist(page):
    """Every `entrenar COMMAND` that a page types is a command, and every config it names is there."""
    for line in re.findall(r"^\$ entrenar (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        words = shlex.split(line.split("  #")[0])
        assert words[0] in COMMANDS, line
        for name in re.findall(r"configs/[\w.-]+", line):
            assert (ROOT / name).is_file(), line


def test_the_specifications_own_line_is_valid():
    """`entrenar train --config configs/124m.json --epochs 10 --batch-size 32` is a valid config of the 124m preset."""
    flags = {option.flag: option.key for option in options()}
    config = load_config(ROOT / "configs/124m.json", {flags["--epochs"]: "10", flags["--batch-size"]: "32"})
    assert (config.train.epochs, config.data.batch_size) == (10, 32)
    assert config.model.parameter_count() == 123_685_632

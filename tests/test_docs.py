"""What README and book say is so: links lead somewhere, commands exist, tables are those of the raw figures."""

import hashlib
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from entrenar.config import options
from entrenar.config_file import load_config

from . import documentation

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    option_types = importlib.import_module("option_types")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", documentation.pages(), ids=by_name)
def test_a_page_says_only_what_is_there(page):
    """Links and anchors, commands and flags, make targets, scripts, paths, and names in Python blocks are there."""
    assert documentation.faults(page) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("[a page](nowhere.md)", "dead link"),
        ("[a part](#nowhere-at-all)", "no such heading"),
        ("```console\n$ entrenar fly --fast\n```", "no command 'fly'"),
        ("```console\n$ entrenar train --config configs/stdlib.toml --learning 1\n```", "not a flag: --learning"),
        ("```console\n$ entrenar trace run -- entrenar train --learning 1\n```", "not a flag: --learning"),
        ("```console\n$ entrenar quality tdg src --explian\n```", "not a flag: --explian"),
        ("```bash\ntorchrun --nproc-per-node 2 -m entrenar train --learning 1\n```", "not a flag: --learning"),
        ("```console\n$ entrenar convert a b --to png\n```", "invalid choice"),
        ("```console\n$ entrenar train --config configs/nowhere.toml\n```", "no file configs/nowhere.toml"),
        ("```\nentrenar plan --presett 124m\n```", "--presett"),
        ("```bash\ncd x && make everything\n```", "no target everything"),
        ("```bash\npython nowhere.py\n```", "no script"),
        ("```bash\npython benchmarks/train_step.py --fast\n```", "no flag --fast"),
        ("```bash\npython -m nowhere_at_all\n```", "no module"),
        ("`entrenar train --config FILE [--learning …]`", "--learning"),
        ("`entrenar fly`", "no command fly"),
        ("`make everything`", "no such target"),
        ("`src/entrenar/nowhere.py`", "no such file"),
        ("`entrenar.recipe.nowhere`", "no such name"),
        ("```python\nimport entrenar\nentrenar.fly()\n```", "no entrenar.fly"),
        ("```python\nfrom entrenar.model import Nobody\n```", "no entrenar.model.Nobody"),
        ("```python\nif:\n```", "Python block"),
    ],
)
def test_a_planted_fault_is_found(planted, found):
    """Each kind of fault in a page is seen, and named."""
    faults = documentation.faults(ROOT / "docs" / "index.md", f"# A page\n\n{planted}\n")
    assert len(faults) == 1
    assert found in faults[0]


@pytest.mark.parametrize(
    "holds",
    [
        "[a part](#a-page)", "[elsewhere](https://example.org/#x)", "`entrenar COMMAND --help`",
        "`src/entrenar/ops/NAME.py`",
        "```console\n$ entrenar trace run --trace-compute -- entrenar train --lr 1e-3   # slow\n```",
        "```bash\nX=1 python benchmarks/tables.py --check > out && make test WORKERS=1\n```",
        "```python\nimport entrenar\nentrenar.plan(preset=\"tiny\")\n```",
    ],
)  # fmt: skip
def test_what_holds_is_no_fault(holds):
    """The checker has no false alarms on these."""
    assert documentation.faults(ROOT / "docs" / "index.md", f"# A page\n\n{holds}\n") == []


@pytest.mark.parametrize("page", tables.PAGES, ids=by_name)
def test_tables_are_those_of_the_raw_figures(page):
    """Nothing between the marks of a table was written by hand."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_makes_a_page_stale():
    """The check above sees a number that is not the raw one."""
    page = "<!-- table: train_step -->\n| 1000 tokens/s |\n<!-- end -->"
    assert tables.filled(page) != page


def test_the_types_of_the_options_are_those_of_the_config_models():
    """A new option is a typed keyword of the library too."""
    written = option_types.OUT.read_text(encoding="utf-8")
    assert written == option_types.text(), "run python benchmarks/option_types.py"


def test_the_specifications_own_line_is_valid():
    """`entrenar train --config configs/124m.json --epochs 10 --batch-size 32` is a valid config of the 124m preset."""
    flags = {option.flag: option.key for option in options()}
    config = load_config(ROOT / "configs/124m.json", {flags["--epochs"]: "10", flags["--batch-size"]: "32"})
    assert (config.train.epochs, config.data.batch_size) == (10, 32)
    assert config.model.parameter_count() == 123_685_632


def nav_entries() -> list[str]:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    return re.findall(r": ([\w/.-]+\.md)$", nav, flags=re.MULTILINE)


def test_the_book_lists_every_page():
    """Each page is in the navigation once, and each entry of the navigation is a page."""
    assert sorted(nav_entries()) == sorted(str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md"))


def test_the_index_links_every_page_of_the_navigation():
    """A reader on the forge, without the built book, finds each page from its index."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    own = ("index.md", "specifications/llama-integration.md")
    assert [entry for entry in nav_entries() if f"]({entry})" not in index and entry not in own] == []


@pytest.mark.parametrize(
    "name",
    [
        "examples/llama2/transpiled_finetuning.md", "examples/llama2/README.md", "examples/llama2/Makefile",
        "scripts/analyze_training.sh", "docs/examples/llama2-finetuning.md", "docs/advanced/llama-tracing.md",
    ],
)  # fmt: skip
def test_pages_of_the_specification_are_there(name):
    """What the specification names exists under its name."""
    assert (ROOT / name).is_file()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pictures_were_drawn_from_the_figures_that_are_there():
    """Each picture of a page is listed with the hash of its data; new figures ask for a new picture."""
    listed = tomllib.loads((ROOT / "docs" / "pictures.toml").read_text(encoding="utf-8"))
    shown = {
        str((page.parent / name).resolve().relative_to(ROOT.resolve()))
        for page in documentation.pages()
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == set(listed)
    drawn = [(picture["data"], picture["sha256"]) for picture in listed.values() if "data" in picture]
    assert [name for name, sha256 in drawn if digest(ROOT / name) != sha256] == [], "draw the picture again"
    assert all("data" in picture or "reason" in picture for picture in listed.values())

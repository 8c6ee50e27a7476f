"""Every example runs, to its end, on a tiny model."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from entrenar.cli import train
from entrenar.config_file import load_config, load_finetune_config
from entrenar.data import PrepareConfig, prepare, train_bpe
from entrenar.model import Llama, LlamaConfig
from entrenar.recipe import write_model_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = [{"prompt": f"say {word}", "completion": f" {word}!"} for word in ("tea", "sea", "pea", "bee")] * 4

# What each is called with; MODEL, ROWS, TEXTS and OUT stand for a tiny model, files of rows and a place to write to.
ADAPTER = ["--model", "MODEL", "--data", "ROWS", "--out", "OUT", "--steps", "2"]
CALLS = {
    "finetune_docstrings/make_rows.py": ["--out", "OUT"],
    "llama2/architecture.py": [],
    "llama2/train.py": [
        "--config",
        "TINY",
        "--corpus",
        "CORPUS",
        "--runs-dir",
        "OUT",
        "--steps",
        "2",
        "--prompt",
        "say",
    ],
    "llama2/finetune_tiny.py": ["TEXTS", "OUT"],
    "llama2/transpile.py": [str(EXAMPLES / "llama2/finetune_tiny.py"), "--output", "OUT", "--source-map", "OUT"],
    "llama2/finetune_lora.py": ADAPTER,
    "llama2/finetune_qlora.py": ADAPTER,
    "llama2/memory_benchmarks.py": ["--seq-len", "16", "--only", "QLoRA"],
}
# A word of what each prints when it is done.
SAYS = {
    "llama2/architecture.py": "logits                (1, 4, 4096)",
    "llama2/train.py": "bits per byte\ns",
    "llama2/finetune_lora.py": "reads back with logits that differ by",
    "llama2/memory_benchmarks.py": "QLoRA bf16",
}
SPECIFIED = (
    "architecture", "train", "finetune_lora", "finetune_qlora", "memory_benchmarks",
)  # fmt: skip
CONFIGS = sorted((EXAMPLES / "llama2" / "configs").iterdir())


def examples() -> list[str]:
    return sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model with its tokenizer, and rows."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = train_bpe([json.dumps(row) for row in ROWS], 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
        max_seq_len=64,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    write_model_folder(folder / "model", model, dict(model.named_parameters()), tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in ROWS))
    (folder / "text.txt").write_text("\n\n".join(f"say tea {number} to bee {number + 1}" for number in range(600)))
    prepare([folder / "text.txt"], folder / "corpus", PrepareConfig(vocab_size=300, val_fraction=0.2))
    (folder / "tiny.toml").write_text(
        'name = "page"\n[model]\nvocab_size = 300\nhidden_size = 32\nnum_layers = 1\nnum_heads = 2\n'
        "intermediate_size = 32\n[data]\nbatch_size = 2\nseq_len = 32\n[train]\nthreads = 1\n"
    )
    own = {"CORPUS": str(folder / "corpus"), "TINY": str(folder / "tiny.toml")}
    return own | {
        "MODEL": str(folder / "model"),
        "ROWS": str(folder / "rows.jsonl"),
        "TEXTS": str(folder / "texts.jsonl"),
    }


def test_every_example_has_a_call() -> None:
    """An example that nobody runs is found."""
    assert [name for name in examples() if name not in CALLS] == []


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_pages_of_the_specification_fit_on_a_page(name: str) -> None:
    """Each exists under its specified name, in at most 80 lines."""
    assert len((EXAMPLES / "llama2" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_of_the_examples_is_valid(path: Path) -> None:
    """Those that name a model to fine-tune are configs of fine-tuning, the others of pre-training."""
    is_finetuning = "method = " in path.read_text(encoding="utf-8")
    config = load_finetune_config(path, {}) if is_finetuning else load_config(path, {})
    assert config.name


def test_the_specified_configs_are_there() -> None:
    """The sizes of the specification, and the file of its own command line."""
    assert {path.name for path in CONFIGS} == {
        "tiny.toml", "124m.toml", "1b.toml", "7b.toml", "llama3-8b.toml", "124m.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", examples())
def test_an_example_runs_to_its_end(name: str, places: dict[str, str], tmp_path: Path) -> None:
    """Called as its first lines say, it ends without an error and without a warning."""
    here = places | {"OUT": str(tmp_path / "out")}
    words = [here.get(word, word) for word in CALLS[name]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *words],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS.get(name, "") in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/examples/llama2-finetuning.md"])
def test_the_python_block_of_a_page_runs(page: str, places: dict[str, str], tmp_path: Path) -> None:
    """As it is printed, except for the paths of model and data and for two steps in place of 200."""
    block = (EXAMPLES.parent / page).read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert "max_steps=200" in block
    for printed, tiny in (("max_steps=200", "max_steps=2"), ('"DIR"', repr(places["MODEL"]))):
        block = block.replace(printed, tiny)
    (tmp_path / "configs").mkdir()
    config = (
        Path(places["TINY"]).read_text().replace("[data]\n", f"[data]\ncorpus = [{json.dumps(places['CORPUS'])}]\n")
    )
    (tmp_path / "configs" / "stdlib.toml").write_text(config)
    (tmp_path / "rows.jsonl").write_text(Path(places["ROWS"]).read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, with small figures in the cell that is tagged for it."""
    found = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    tagged = [cell for cell in found if cell["metadata"].get("tags") == ["parameters"]]
    assert ["".join(cell["source"]).partition(" = ")[0] for cell in tagged] == ["STEPS, STORIES"]
    return ["STEPS, STORIES = 2, 300" if cell in tagged else "".join(cell["source"]) for cell in found]


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.rglob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_to_its_end(notebook: Path, tmp_path: Path) -> None:
    """Cell after cell, without an error and without a warning; it is kept without outputs."""
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(cells(notebook)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapter in first_model/runs/who" in done.stdout
    assert done.stdout.endswith("learning_rate is not an option; did you mean lr?\n")
    assert (tmp_path / "first_model" / "stories.gguf").is_file()
    assert all(not cell.get("outputs") for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def test_the_cluster_examples_start_a_command_that_exists() -> None:
    """The words after `entrenar` parse, whatever cluster starts them."""
    script = (EXAMPLES / "cluster" / "train.sbatch").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in script.splitlines() if line.startswith("srun torchrun")]
    jobset = yaml.safe_load((EXAMPLES / "cluster" / "jobset.yaml").read_text(encoding="utf-8"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for words in (shlex.split(line), [word for arg in container["args"] for word in arg.split("=", 1)]):
        command = words[words.index("-m") + 2 :]
        assert command[0] == "train"
        parsed = train._arguments().parse_args(command[1:])
        assert parsed.resume_if_any

"""Bugs that other toolkits shipped: planted in this project's source, each is caught; every test the page names exists.

`docs/peer_bugs.md` tells the bugs. A planted bug is held against the first test that its row of the page names, which
must pass without it and fail with it.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrenar.config import options

from .mutants import planted, source_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "peer_bugs.md").read_text(encoding="utf-8")
SRC = ROOT / "src" / "entrenar"

# The name on the page, what is planted, and the test that is held against it.
BUGS: dict[str, tuple[str, str, str, str]] = {
    "upstream gradient ignored": (
        "ops.linear_cross_entropy", "scaled[block] = grad[block] * scale", "scaled[block] = grad[block]",
        "tests/ops/test_linear_cross_entropy.py::test_every_chunk_size_gives_the_dense_loss_and_gradients"),
    "weight kept on the context": (
        "ops.quantized.linear",
        "ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lora_a, lora_b, kept, low, *weight)",
        "ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lora_a, lora_b, kept, low, *("
        "None if part is None else part.clone() for part in weight))",
        "tests/ops/quantized/test_linear.py::test_writing_to_what_the_backward_needs_is_noticed"),
    "dropout mask missing in dx": (
        "ops.lora_linear", "return dx.add_(product) if kept is None else dx.addcmul_(product, kept.to(dx.dtype))",
        "return dx.add_(product)",
        "tests/ops/test_lora_linear.py::test_output_and_gradients_equal_the_reference"),
    "alpha ignored": (
        "ops.lora_linear", "return y.addmm_(low, lora_b.mT, alpha=scale)", "return y.addmm_(low, lora_b.mT)",
        "tests/ops/test_lora_linear.py::test_output_and_gradients_equal_the_reference"),
    "heads grouped in the wrong order": (
        "ops.attention", "x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
        "x.flip(1).reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
        "tests/ops/test_attention.py::test_fast_path_equals_the_derived_backward"),
    "mean of means": (
        "ops.linear_cross_entropy", "scaled[block] = grad[block] * scale",
        "scaled[block] = grad[block] * scale / len(grad)",
        "tests/property_llama.py::test_a_batch_cut_into_micro_batches_has_the_gradient_of_the_whole"),
    "documents see each other": (
        "ops.attention", "documents.spans, compute_dtype or q.dtype)", "(), compute_dtype or q.dtype)",
        "tests/ops/test_attention.py::test_a_packed_document_is_as_it_is_alone"),
    "merged in low precision": (
        "peft.layers", "total = torch.addmm(widened(weight, lora_a.dtype), lora_b, lora_a, alpha=self.scale)",
        "total = torch.addmm(widened(weight, lora_a.dtype), lora_b, lora_a, alpha=self.scale).to(dtype)"
        " - widened(weight, lora_a.dtype).to(dtype) + widened(weight, lora_a.dtype).to(dtype)",
        "tests/peft/test_lora.py::test_merge_adds_in_float32_and_rounds_once"),
    "gradient of frozen weights": (
        "ops.lora_linear", "if wants_weight and rows is not None:\n            dweight",
        "if True:\n            rows = x.reshape(-1, x.shape[-1]).to(wide)\n            dweight",
        "tests/ops/test_op_contract.py::test_a_frozen_input_costs_nothing"),
    "rows lost when memory is short": (
        "train.step", "[piece for batch in batches for piece in batch.split(self.rows)]",
        "[batch.split(self.rows)[0] for batch in batches]",
        "tests/train/test_step.py::test_out_of_memory_halves_the_pieces_and_keeps_the_gradient"),
    "ranks share rows": (
        "data.corpus.loader", "rows_of_rank(batch_size, rank, world_size)", "slice(0, batch_size // world_size)",
        "tests/data/corpus/test_loader.py::test_ranks_share_one_global_batch"),
    "position forgotten": (
        "data.corpus.loader", "self._start = start or LoaderState(", "self._start = LoaderState(",
        "tests/data/corpus/test_loader.py::test_resuming_anywhere_equals_not_stopping"),
}  # fmt: skip


def run_each(bugs: dict[str, tuple[str, str, str, str]]) -> None:
    """Run each bug's test with the bug planted; print what each run ended with."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--hypothesis-profile", "mutation"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # pytest is started more than once in this process
    ends = {}
    for name, (module, old, new, test) in bugs.items():
        with planted(f"entrenar.{module}", old, new):
            ends[name] = int(pytest.main([*quiet, test]))
    print("ENDS", json.dumps(ends))  # noqa: T201 - read by the process that started this one


@pytest.fixture(scope="module")
def ends() -> dict[str, int]:
    """The exit code of pytest for each bug."""
    code = "from tests.test_peer_bugs import BUGS, run_each; run_each(BUGS)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if line.startswith("ENDS")]
    assert lines, found.stdout[-2000:] + found.stderr[-2000:]
    result: dict[str, int] = json.loads(lines[-1].removeprefix("ENDS "))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_others_shipped_is_caught(bug, ends):
    """With the bug planted in the source, its test fails, which passes in the suite."""
    assert ends[bug] == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_on_the_page(bug):
    """The page tells each bug by this name, before the test that it is held against; its source still has the text."""
    module, old, _, test = BUGS[bug]
    assert f"| `{bug}` | `{test}`" in PAGE
    assert source_of(f"entrenar.{module}").count(old) == 1


def named_tests() -> list[str]:
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", PAGE)) | {test for *_, test in BUGS.values()})


@pytest.mark.parametrize("test", named_tests())
def test_every_test_that_is_named_exists(test):
    """No row of the page stands on a test that was renamed or deleted."""
    path, name = test.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def read_names(folder: Path) -> Iterator[str]:
    """Yield every name that a tree of sources reads as an attribute, or looks up by its text."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_setting_is_read_by_something(tmp_path):
    """A setting that is validated, documented and then read by nothing is found, also when it is planted."""
    read = set(read_names(SRC))
    settings = {option.key.split(".")[-1] for option in options()}
    assert settings
    assert settings - read == set()
    (tmp_path / "planted.py").write_text("def use(config):\n    return config.lr\n")
    assert settings - set(read_names(tmp_path)) == settings - {"lr"}

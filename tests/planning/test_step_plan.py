"""The plan is what the kernel measures: a fresh process plans, and another takes the steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan.py"


def cell(preset, method, precision, batch, length, checkpointing, rank="8"):
    flags = {"preset": preset, "method": method, "precision": precision, "rank": rank, "batch_size": str(batch)}
    return flags | {"seq_len": str(length), "checkpointing": checkpointing, "freed_memory": "return"}


def measure(flags, folder=None):
    command = [sys.executable, str(BENCHMARK), "--part", "measure", "--flags", json.dumps(flags)]
    command += [] if folder is None else ["--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write each preset once, as a bfloat16 folder."""
    root = tmp_path_factory.mktemp("models")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import plan; from pathlib import Path\n"
    code += "for name in sys.argv[3:]: plan.write_folder(name, Path(sys.argv[2]) / name)"
    command = [sys.executable, "-c", code, str(BENCHMARK.parent), str(root), "tiny", "124m"]
    subprocess.run(command, check=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        cell("tiny", "pretrain", "float32", 4, 256, "none"),
        cell("tiny", "full", "bfloat16", 4, 256, "full"),
        cell("tiny", "lora", "bfloat16", 16, 64, "selective", "64"),
        cell("124m", "pretrain", "float32", 1, 512, "none"),
        cell("124m", "lora", "bfloat16", 1, 512, "none"),
        cell("124m", "qlora", "bfloat16", 2, 512, "selective"),
    ],
    ids=lambda flags: "-".join(flags.values()),
)
def test_the_planned_peak_is_the_measured_one(flags, folders):
    """Over the imports, the plan is within 5 % of the kernel's peak."""
    folder = None if flags["method"] == "pretrain" else folders / flags["preset"]
    found = measure(flags, folder)
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.05), found

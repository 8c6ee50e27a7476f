"""Every road of training on a device that is not the CPU: nothing is left behind on the host, nobody waits for long.

The device of `phantom.py` computes on the CPU, by the paths for devices: its losses are the CPU's up to rounding.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "phantom_program.py"
RUNS = [
    "pretraining float32", "pretraining bfloat16 adamw8bit selective", "pretraining bfloat16 muon full", "tuning full",
    "tuning lora", "tuning qlora",
]  # fmt: skip
ROADS = [*RUNS, "tuning lora with trunk cache", "resuming", "generating"]
STEPS = 4


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the program saw on each road."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "phantom_program.py"),
        str(tmp_path_factory.mktemp("phantom")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {*ROADS, "planted"}
    return report


@pytest.mark.parametrize("road", ROADS)
def test_a_road_leaves_nothing_on_the_host(seen, road):
    """No operation mixes the devices."""
    assert seen[road]["mixed"] == []


@pytest.mark.parametrize("road", [road for road in ROADS if road != "generating"])
def test_the_losses_are_the_cpus(seen, road):
    """The first up to float32's rounding; later ones differ by the roundings of weights, in bfloat16 one in 256."""
    first, *later = seen[road]["differences"]
    assert first <= 1e-6
    assert max(later) <= (1e-6 if "float32" in road or road == "resuming" else 2e-3)


@pytest.mark.parametrize("road", RUNS)
def test_a_step_waits_for_the_device_once(seen, road):
    """For its loss and its norm, read together."""
    *before_last, _ = seen[road]["waits"]  # the last step evaluates
    assert np.diff(before_last).tolist() == [1] * (STEPS - 2), seen[road]["places"]


def test_generation_waits_once_a_token(seen):
    """The next token of all rows is read once; the first logits are looked at for NaN. The text is the CPU's."""
    assert sum(seen["generating"]["places"].values()) <= 1 + seen["generating"]["steps"], seen["generating"]["places"]
    assert seen["generating"]["is_text_equal"]


def test_what_the_fixture_is_for_is_noticed(seen):
    """A planted sum over both devices, and a planted wait."""
    assert [operation for operation, _ in seen["planted"]["mixed"]] == ["aten.add.Tensor"]
    assert sum(seen["planted"]["places"].values()) == 1

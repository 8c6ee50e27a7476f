"""Train under less and less memory: the same weights, or a clear refusal, and nothing else.

    python benchmarks/chaos.py --json benchmarks/results/chaos.json

`entrenar train` runs on a small model with a large batch, through `quality.chaos`: when it has begun to train, the
kernel limits the memory that it may add, in 20 steps from 400 MB down to 1 MB. A run that ends well must have the
weights of the undisturbed one to 1e-5 (a step that was repeated in halves adds the same numbers in another order), and
one that does not must end with exit code 3 and a sentence.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from entrenar.data import PrepareConfig, prepare
from entrenar.quality.chaos import ChaosConfig, run
from entrenar.train import latest_good

MOST, LEAST, LEVELS = 400e6, 1e6, 20


def command(folder: Path, name: str) -> list[str]:
    """Return the training command."""
    flags = {
        "name": name, "runs-dir": folder / "runs", "corpus": folder / "corpus", "batch-size": 32, "seq-len": 128,
        "vocab-size": 300, "hidden-size": 128, "num-layers": 4, "num-heads": 4, "num-kv-heads": 2,
        "intermediate-size": 344, "max-seq-len": 128, "max-steps": 4, "eval-every": 0, "threads": 1, "save-every": 2,
    }  # fmt: skip
    return [sys.executable, "-m", "entrenar", "train", *(f"--{flag}={value}" for flag, value in flags.items())]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of a run's newest checkpoint."""
    model = latest_good(folder / "runs" / name / "checkpoints").model
    return load_file(model / "model.safetensors")


def main() -> int:
    """Run every level; 1 if one ended in any other way."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    parsed = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = np.random.default_rng(0).choice(["def", "return", "value", "self", "import", "0"], size=(2000, 30))
        (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
        options = PrepareConfig(vocab_size=300, val_fraction=0.05, document_separator="----", threads=1)
        prepare([folder / "text.txt"], folder / "corpus", options)
        run(ChaosConfig(), command(folder, "free")).demand()
        wanted = weights(folder, "free")
        for level in np.geomspace(MOST, LEAST, LEVELS):
            name = f"limit-{int(level)}"
            outcome = run(ChaosConfig(memory_bytes=int(level), after="Training", timeout_s=600), command(folder, name))
            difference = None
            if outcome.ending == "survived":
                found = weights(folder, name)
                difference = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
            is_good = (difference is not None and difference < 1e-5) or (outcome.exit_code == 3 and outcome.is_graceful)
            rows.append(
                {
                    "added_mb": round(level / 1e6, 2), "ending": outcome.ending, "exit_code": outcome.exit_code,
                    "largest_difference": difference, "is_good": is_good, "peak_mb": round(outcome.peak_bytes / 1e6),
                    "not_enforced": list(outcome.not_enforced),
                    "said": outcome.message.splitlines()[-1][:300] if outcome.message else "",
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps({"levels": rows}, indent=1) + "\n")
    return int(not all(row["is_good"] and not row["not_enforced"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

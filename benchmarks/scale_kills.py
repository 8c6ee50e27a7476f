"""Kill random ranks of a run under `torchrun --max-restarts` at random moments, and compare the final bytes.

    python benchmarks/scale_kills.py --kills 50 --json benchmarks/results/scale_kills.json

One launch of two ranks trains a small model and saves every second step. A rank chosen by the seed is killed with
SIGKILL at a random moment after it has started, so also while it loads torch or meets the others; torchrun then starts
all ranks again. Kept: the moment of each kill, and whether the run's end is that of an undisturbed launch.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from kills import final_bytes

from entrenar.data import PrepareConfig, prepare
from entrenar.runs import list_checkpoints

RANKS = 2
_START_S = 8.0  # about what two ranks take to come to their first step here


def corpus_in(folder: Path) -> Path:
    """Prepare a small corpus."""
    words = np.random.default_rng(0).choice(["def", "return", "value", "self", "import", "for"], size=(400, 30))
    (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    options = PrepareConfig(vocab_size=300, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", options)
    return folder / "corpus"


def launch(corpus: Path, runs: Path, steps: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start torchrun."""
    options = {
        "corpus": corpus, "runs-dir": runs, "name": "run", "batch-size": 4, "seq-len": 32, "vocab-size": 300,
        "hidden-size": 64, "num-layers": 2, "num-heads": 4, "intermediate-size": 128, "max-seq-len": 64,
        "max-steps": steps, "eval-every": 0, "threads": 1, "save-every": 2, "device": "cpu", "compute-dtype": "float32",
    }  # fmt: skip
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts"]
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, str(restarts), "-m", "entrenar", "train", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the processes that torchrun has started, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((word for word in words if word.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank[5:])] = int(pid)
    return found


def attack(corpus: Path, runs: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    """Kill until the number is reached, then let the run end; return what was met."""
    chance = random.Random(parsed.seed)  # noqa: S311 - moments, not secrets
    started = launch(corpus, runs, parsed.steps, parsed.kills + 5)
    run, met, done, last = runs / "run", Counter[str](), 0, frozenset[int]()
    killed: Counter[int] = Counter()
    while done < parsed.kills and started.poll() is None:
        ranks = ranks_of(started.pid)
        if len(ranks) < RANKS or last & frozenset(ranks.values()):
            time.sleep(0.01)  # the ranks of before are not gone yet
            continue
        time.sleep(chance.uniform(0.0, 2 * _START_S))
        victim = chance.randrange(RANKS)
        last = frozenset(ranks.values())
        newest = max(list_checkpoints(run / "checkpoints"), default=0)
        with suppress(ProcessLookupError):
            os.kill(ranks[victim], signal.SIGKILL)
            done += 1
            killed[victim] += 1
            met[f"step {newest}"] += 1
            print(f"kill {done}: rank {victim} at step {newest}", file=sys.stderr, flush=True)
    return {"exit": started.wait(), "kills": done, "of_rank": dict(killed), "moments": dict(met)}


def main() -> int:
    """Run undisturbed and attacked, and print how they compare; 1 if the weights differ or the run was lost."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", type=Path)
    parsed = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = corpus_in(folder)
        if code := launch(corpus, folder / "undisturbed", parsed.steps, 0).wait():
            raise SystemExit(f"the undisturbed run ended with {code}")
        began = time.monotonic()
        found = attack(corpus, folder / "attacked", parsed)
        found["took_s"] = round(time.monotonic() - began)
        is_same = final_bytes(folder / "attacked" / "run") == final_bytes(folder / "undisturbed" / "run")
    result = {"seed": parsed.seed, "steps": parsed.steps, "ranks": RANKS, **found, "same_final_bytes": is_same}
    print(json.dumps(result))
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(found["exit"] != 0 or not is_same)


if __name__ == "__main__":
    sys.exit(main())

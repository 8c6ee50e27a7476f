"""Kill training runs at random moments, resume them, and compare the final bytes with an undisturbed run.

    python benchmarks/kills.py --kills 200 --json benchmarks/results/kills.json

Each way of training runs in a forked child on a small model, saves every second step, and is killed with SIGKILL after
a random time, again and again, until it comes to its end. `saves` kills while a checkpoint is being written, `resumes`
within the first moments of a resumed run. The random times follow from a seed; what a kill meets also depends on the
machine's load, so the moment of each kill (the newest checkpoint at that time) is recorded too.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrenar import recipe
from entrenar.config_file import load_config, load_finetune_config
from entrenar.data import PrepareConfig, prepare
from entrenar.files import sha256_file
from entrenar.runs import RunFolder, list_checkpoints
from entrenar.train import latest_good

STEPS = 24
WAYS = ("float32", "bfloat16", "lora", "qlora", "saves", "resumes")
_LEAST_S = 0.02


@dataclass
class Ground:
    """What all runs share: a corpus, rows, and a base to fine-tune."""

    folder: Path

    def __post_init__(self) -> None:
        chance = np.random.default_rng(0)
        words = chance.choice(["def", "return", "value", "self", "import", "for", "in", "0"], size=(300, 30))
        text = self.folder / "text.txt"
        text.write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
        options = PrepareConfig(vocab_size=300, val_fraction=0.1, document_separator="----", threads=1)
        prepare([text], self.folder / "corpus", options)
        rows = [{"prompt": f"def {number}", "completion": " return 0"} for number in range(48)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.pretrain(self.folder / "base", "float32", resume=False)

    def pretrain(self, run: Path, precision: str, *, resume: bool) -> None:
        """Pre-train a model of two layers."""
        flags = {
            "name": run.name, "runs_dir": str(run.parent), "data.corpus": json.dumps([str(self.folder / "corpus")]),
            "data.batch_size": "4", "data.seq_len": "32", "model.vocab_size": "300", "model.hidden_size": "64",
            "model.num_layers": "2", "model.num_heads": "4", "model.num_kv_heads": "2",
            "model.intermediate_size": "128", "model.max_seq_len": "64", "train.max_steps": str(STEPS),
            "train.eval_every": "6", "train.threads": "1", "train.precision": precision, "checkpoint.save_every": "2",
        }  # fmt: skip
        recipe.train(load_config(None, flags), resume=resume)

    def finetune(self, run: Path, method: str, *, resume: bool) -> None:
        """Train an adapter on the base, with the trunk cache where the base is quantized."""
        flags = {
            "model": str(self.folder / "base"), "method": method, "name": run.name, "runs_dir": str(run.parent),
            "sft.data": json.dumps([str(self.folder / "rows.jsonl")]), "sft.batch_size": "2", "sft.seq_len": "64",
            "train.max_steps": str(STEPS), "train.threads": "1", "train.eval_every": "6", "checkpoint.save_every": "2",
        }  # fmt: skip
        if method == "qlora":
            cache = str(run.with_name(f"{run.name}-trunk"))
            flags |= {"trunk.cache_trunk": "true", "trunk.trunk_dir": cache, "lora.layers": "top:1"}
        recipe.finetune(load_finetune_config(None, flags), resume=resume)

    def work(self, way: str, run: Path) -> None:
        """Train in one of the ways, from the newest checkpoint if there is one."""
        resume = bool(list_checkpoints(run / "checkpoints"))
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        if way in ("lora", "qlora"):
            self.finetune(run, way, resume=resume)
        else:
            self.pretrain(run, "bfloat16" if way == "bfloat16" else "float32", resume=resume)


def final_bytes(run: Path) -> dict[str, str]:
    """Return the hash of each tensor file of the newest checkpoint, and of the state that the next step needs."""
    good = latest_good(run / "checkpoints")
    hashes = {str(path.relative_to(good.path)): sha256_file(path) for path in good.path.rglob("*.safetensors")}
    state = {key: good.state[key] for key in ("loader", "rng")} | {
        "step": good.step,
        "losses": [(record.step, record.loss) for record in RunFolder(run).read_steps()],
    }
    return {**hashes, "state": repr(state)}


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked child and return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            work()
            code = 0
        os._exit(code)
    return child


def is_over(child: int) -> int | None:
    """Return a child's exit code, or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def being_saved(run: Path) -> set[str]:
    """Return the names of half-written checkpoints."""
    folder = run / "checkpoints"
    return (
        {path.name for path in folder.iterdir() if path.name.startswith(".incomplete-")} if folder.is_dir() else set()
    )


def until_moment(run: Path, child: int, wait_s: float, saves: int) -> int | None:
    """Wait until the child is to be killed: for a time, or for a save; return its exit code if it ended before."""
    end = time.monotonic() + wait_s
    seen: set[str] = set()
    while time.monotonic() < end:
        code = is_over(child)
        if code is not None:
            return code
        if saves:
            seen |= being_saved(run)
            if len(seen) >= saves:
                return None
        time.sleep(0.0005)
    return None


def attack(ground: Ground, way: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs of one way `kills` times; return how they ended."""
    chance = random.Random(f"{seed} {way}")  # noqa: S311 - moments, not secrets
    reference = ground.folder / f"{way}-undisturbed"
    started = time.monotonic()
    if is_code := os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: ground.work(way, reference)), 0)[1]):
        raise SystemExit(f"the undisturbed run of {way} ended with {is_code}")
    whole_s = time.monotonic() - started
    wanted = final_bytes(reference)
    met: Counter[str] = Counter()
    done = runs = failed_resumes = different = 0
    began = time.monotonic()
    while done < kills:
        run = ground.folder / f"{way}-{runs}"
        runs += 1
        while True:
            child = in_child(lambda run=run: ground.work(way, run))
            most_s = whole_s / 6 if way == "resumes" and list_checkpoints(run / "checkpoints") else whole_s
            wait_s, saves = chance.uniform(_LEAST_S, most_s), 0
            if way == "saves":
                wait_s, saves = math.inf, chance.randint(1, 8)
            code = until_moment(run, child, wait_s if done < kills else math.inf, saves if done < kills else 0)
            if code is not None:
                failed_resumes += code != 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            newest = max(list_checkpoints(run / "checkpoints"), default=0)
            half_written = bool(being_saved(run))
            met[f"step {newest}{', a save half written' if half_written else ''}"] += 1
        if code == 0:
            different += final_bytes(run) != wanted
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run.with_name(f"{run.name}-trunk"), ignore_errors=True)
    half = sum(count for moment, count in met.items() if "half" in moment)
    return {
        "kills": done, "runs": runs, "runs_that_failed": failed_resumes, "runs_with_other_bytes": different,
        "kills_while_saving": half, "moments": dict(sorted(met.items())), "undisturbed_s": round(whole_s, 2),
        "took_s": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> int:
    """Attack every way and print a row for each; 1 if a run was lost or is different."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments.add_argument("--json", type=Path)
    parsed = arguments.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        ground = Ground(Path(name))
        for way in parsed.ways:
            found[way] = attack(ground, way, parsed.kills, parsed.seed)
            print(way, json.dumps({k: v for k, v in found[way].items() if k != "moments"}), flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps({"seed": parsed.seed, "steps": STEPS, "ways": found}, indent=1) + "\n")
    return int(any(row["runs_that_failed"] or row["runs_with_other_bytes"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())

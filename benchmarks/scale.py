"""Measure what several ranks of this machine gain, in turns: plain, one rank under torchrun, two, and three.

    python benchmarks/scale.py --rounds 3            # writes benchmarks/results/scale.json

Each way trains the same model on the same global batch with one thread a rank, and its figure is the median time of a
step of the same process, the first steps left out. Kept beside it: the link that two and three ranks measure, so that
`scale_model.py` can say what the model of `entrenar plan --ranks` makes of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scale_kills import corpus_in
from turns import machine, write_result

from entrenar.runs import RunFolder

WAYS = {"plain": 0, "torchrun 1": 1, "torchrun 2": 2, "torchrun 3": 3}
STEPS, WARMUP = 24, 4
OPTIONS = {
    "batch-size": 6, "seq-len": 128, "vocab-size": 300, "hidden-size": 192, "num-layers": 4, "num-heads": 6,
    "intermediate-size": 512, "max-seq-len": 128, "max-steps": STEPS, "eval-every": 0, "save-every": 0, "threads": 1,
    "device": "cpu", "compute-dtype": "float32",
}  # fmt: skip
_LINK = (
    "import json, dataclasses; from entrenar.scale import joined, measure_link\n"
    "with joined(120.0) as world:\n"
    "    found = measure_link(world)\n"
    "    print(json.dumps(dataclasses.asdict(found))) if world.is_writer else None\n"
)


def command(ranks: int, words: list[str]) -> list[str]:
    """Return a command of so many ranks; plain Python for none."""
    if ranks == 0:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]


def run(ranks: int, words: list[str]) -> str:
    """Run it and return what it prints."""
    ended = subprocess.run(
        command(ranks, words), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return ended.stdout


def step_s(ranks: int, corpus: Path, runs: Path) -> list[float]:
    """Train, and return the seconds of each step after the first few."""
    options = {"corpus": corpus, "runs-dir": runs, "name": "run", **OPTIONS}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    run(ranks, ["-m", "entrenar", "train", "--overwrite", *words])
    elapsed = [record.elapsed_s for record in RunFolder(runs / "run").read_steps()]
    return np.diff(elapsed[WARMUP:]).tolist()


def main() -> None:
    """Measure in turns and write the figures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    rounds = arguments.parse_args().rounds
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    links: dict[int, list[dict[str, float]]] = {2: [], 3: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = corpus_in(folder)
        program = folder / "link.py"
        program.write_text(_LINK)
        for _ in range(rounds):
            for way, ranks in WAYS.items():
                found[way].append(statistics.median(step_s(ranks, corpus, folder / "runs")))
                print(f"{way:<12} {found[way][-1]:.4f} s a step", file=sys.stderr, flush=True)
            for ranks, measured in links.items():
                measured.append(json.loads(run(ranks, [str(program)])))
    result: dict[str, Any] = {
        "machine": machine(), "cores": len(os.sched_getaffinity(0)), "options": OPTIONS, "step_s": found,
        "links": {str(ranks): middle(measured) for ranks, measured in links.items()}, "plan": planned(),
    }  # fmt: skip
    print(write_result("scale", result))


def middle(links: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(link[key] for link in links) for key in links[0]}


def planned() -> dict[str, Any]:
    """Return what the plan counts: trained numbers and tensors, and the arithmetic of a rank's step."""
    from entrenar.config_file import load_config
    from entrenar.planning import plan_run

    table = {"batch-size": "data", "seq-len": "data", "max-steps": "train", "eval-every": "train", "threads": "train"}
    left_out = ("device", "save-every")
    flags = {
        f"{table.get(key, 'model') + '.' if key != 'compute-dtype' else ''}{key.replace('-', '_')}": str(value)
        for key, value in OPTIONS.items()
        if key not in left_out
    }
    steps = {ranks: plan_run(load_config(None, flags), ranks=ranks).step for ranks in (1, 2, 3)}
    return {
        "trained_parameters": steps[1].trained_parameters, "trained_tensors": steps[1].trained_tensors,
        "of_ranks": {ranks: {"flops": s.flops, "moved_bytes": s.moved_bytes, "rates": asdict(s.rates)}
                     for ranks, s in steps.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()

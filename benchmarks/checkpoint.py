"""What a checkpoint costs the training loop at the size of the 124m preset.

    python benchmarks/checkpoint.py [--precision bfloat16] [--steps 24] [--save-every 4] [--folder DIR]

One run of `fit` on random tokens, batch 4 × 512. Three costs are told apart: the *stall*, the seconds in which the loop
itself waits (handing over, and waiting before the optimizer until the live tensors have been read), and the *slowdown*,
by how much longer the step lasts in whose course the thread writes, hashes and syncs, than the median of the others.
The *staging* time of a checkpoint written by itself is what the stall would be if a step took no time at all.
Each is given per checkpoint and as a part of the time of 100 steps, the interval that the bar of 2 % is put to.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from entrenar.model import Llama, LlamaConfig
from entrenar.ops.linear import fastest_compute_dtype
from entrenar.runs import StepRecord
from entrenar.train import (
    CheckpointConfig,
    OptimConfig,
    Run,
    Settings,
    Task,
    TrainConfig,
    build_optimizer,
    checkpoint,
    fit,
    keep_freed_memory,
    latest_good,
)

BATCH_SIZE, SEQ_LEN, INTERVAL_STEPS = 4, 512, 100
RESULT = Path(__file__).parent / "results" / "checkpoint.json"


@dataclass(frozen=True)
class RandomBatch:
    """Random tokens; each but the last predicts the next."""

    input_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def num_targets(self) -> int:
        """How many targets the loss sums over."""
        return int((self.targets >= 0).sum())

    def split(self, rows: int) -> list["RandomBatch"]:
        """Cut by rows."""
        return [RandomBatch(*pair) for pair in zip(self.input_ids.split(rows), self.targets.split(rows), strict=True)]


@dataclass(frozen=True)
class Nowhere:
    """A position that is not needed."""

    def to_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def random_batches(vocab_size: int) -> Iterator[tuple[RandomBatch, Nowhere]]:
    while True:
        ids = torch.randint(0, vocab_size, (BATCH_SIZE, SEQ_LEN))
        yield RandomBatch(ids, torch.cat([ids[:, 1:], torch.full((BATCH_SIZE, 1), -100)], dim=1)), Nowhere()


def measure(folder: Path, precision: str, steps: int, save_every: int) -> dict[str, Any]:
    config = LlamaConfig.preset("124m")
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    stored = getattr(torch, precision)
    model.set_compute_dtype(fastest_compute_dtype(stored, torch.device("cpu")))
    ended: dict[int, float] = {}
    stalls: dict[int, float] = {}

    def on_record(record: StepRecord) -> None:
        ended[record.step] = time.perf_counter()
        stalls[record.step] = record.phases_s.get("checkpoint", 0.0)

    task = Task(
        module=model,
        batches=random_batches(config.vocab_size),
        loss=lambda batch: model.loss(batch.input_ids, batch.targets),
        write_model=lambda path, weights: save_file(dict(weights), path / "model.safetensors"),
        read_model=lambda path: load_file(path / "model.safetensors"),
    )
    settings = Settings(
        TrainConfig(max_steps=steps, precision=precision, eval_every=0),
        checkpoint=CheckpointConfig(save_every=save_every, keep_last=1, keep_best=False),
    )
    fit(task, settings, Run(folder, {}), on_record=on_record)

    # The save after step n is part of step n + 1, as the loop records it.
    seconds = {step: ended[step] - ended[step - 1] for step in range(3, steps + 1)}
    saving = [step for step in seconds if (step - 1) % save_every == 0]
    usual_s = statistics.median(second for step, second in seconds.items() if step not in saving)
    stall_s = statistics.median(stalls[step] for step in saving)
    slowdown_s = statistics.median(seconds[step] for step in saving) - usual_s
    saved = latest_good(folder / "checkpoints")
    return {
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_bytes": sum(file.stat().st_size for file in saved.path.rglob("*") if file.is_file()),
        "step_s": usual_s,
        "stall_s": stall_s,
        "slowdown_s": slowdown_s,
        f"stall_of_{INTERVAL_STEPS}_steps": stall_s / (INTERVAL_STEPS * usual_s),
        f"slowdown_of_{INTERVAL_STEPS}_steps": slowdown_s / (INTERVAL_STEPS * usual_s),
        "all_step_s": list(seconds.values()),
        "all_stalls_s": [stalls[step] for step in saving],
    }


def write_alone(folder: Path, precision: str) -> dict[str, float]:
    """Time one checkpoint with nothing beside it: until the tensors have been read, and until it is committed."""
    model = Llama(LlamaConfig.preset("124m"))
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), precision)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for tensor in optimizer.state_dict().values():
        tensor.fill_(1)  # touch the memory, or reading it would cost page faults that no run has
    started = time.perf_counter()
    marks: list[float] = []
    checkpoint.write(
        folder / "alone" / "step-00000001",
        checkpoint.Snapshot(1, weights, optimizer.state_dict(), {}),
        lambda path, tensors: save_file(dict(tensors), path / "model.safetensors"),
        staged=lambda: marks.append(time.perf_counter() - started),
        before_commit=lambda: None,
    )
    return {"staging_s": marks[0], "commit_s": time.perf_counter() - started}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    arguments.add_argument("--steps", type=int, default=24)
    arguments.add_argument("--save-every", type=int, default=4)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--folder", type=Path, help="where the checkpoints are written: the disk that is measured")
    parsed = arguments.parse_args()
    torch.set_num_threads(parsed.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        result = write_alone(Path(folder), parsed.precision)
        result |= measure(Path(folder), parsed.precision, parsed.steps, parsed.save_every)
    result |= {
        "command": f"python benchmarks/checkpoint.py --precision {parsed.precision} --steps {parsed.steps} "
        f"--save-every {parsed.save_every} --threads {parsed.threads}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {parsed.threads} threads, load {os.getloadavg()[0]:.1f} at the end",
        "torch": torch.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if not key.startswith("all_")}, indent=2))


if __name__ == "__main__":
    main()

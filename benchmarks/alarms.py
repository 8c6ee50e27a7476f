"""Inject faults into a small training run, and see what the alarms and a rewind make of them.

    python benchmarks/alarms.py --steps 400 --json benchmarks/results/alarms.json

A LLaMA of two layers reads the stories of the quickstart. At one step a fault comes in with the data: a NaN, a loss a
hundred times too large, or a batch of random tokens. Each fault is run with a rewind and without any policy, with
three seeds, and compared with the run that had no fault: when was it seen, and what is the held-out loss in the end?
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.data import Batch, Corpus, Loader, PrepareConfig, prepare, stories, validation_batches
from entrenar.infer import evaluate
from entrenar.interop import load_model
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.recipe import write_model_folder
from entrenar.runs import RunFolder
from entrenar.train import (
    CheckpointConfig,
    MonitorConfig,
    OptimConfig,
    Run,
    ScheduleConfig,
    Settings,
    Task,
    TrainConfig,
    fit,
    seed_all,
)

SEQ_LEN, BATCH, VOCABULARY = 128, 8, 640
FAULTS = ("nan", "loss_x100", "random_tokens")
ALARMS = ("non_finite", "loss_spike", "gradient_spike")
SPIKE_Z = 20.0  # small batches are noisy: at the default of 6 a healthy run raises gradient spikes after its warm-up


def make_corpus(folder: Path) -> Corpus:
    """Write 3,000 stories and prepare them."""
    text = folder / "stories.txt"
    text.write_text("\n----\n".join(story.text for story in stories.stories(3000, 0)), encoding="utf-8")
    options = PrepareConfig(vocab_size=VOCABULARY, val_fraction=0.03, document_separator="----", threads=1)
    prepare([text], folder / "corpus", options)
    return Corpus.open(folder / "corpus")


def batches(corpus: Corpus, seed: int, fault: str | None, at: int) -> Iterator[tuple[Batch, Any]]:
    """Yield the corpus' batches; one of them, number `at`, is faulty."""
    loader = Loader(corpus, batch_size=BATCH, seq_len=SEQ_LEN, seed=seed)
    for number, (batch, position) in enumerate(loader, start=1):
        if number == at and fault == "random_tokens":
            noise = torch.randint(0, VOCABULARY, batch.targets.shape, generator=torch.Generator().manual_seed(seed))
            yield replace(batch, input_ids=noise, targets=noise.flip(0)), position
        elif number == at and fault is not None:
            yield replace(batch, num_bytes=-1), position  # the mark that the loss looks for
        else:
            yield batch, position


def run(corpus: Corpus, folder: Path, *, seed: int, steps: int, fault: str | None, policy: str) -> dict[str, Any]:
    """Train; return when the fault was seen and the held-out loss at the end."""
    seed_all(seed)
    tokenizer = corpus.tokenizer()
    model = Llama(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=96, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=256,
            max_seq_len=SEQ_LEN, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.init_weights(torch.Generator().manual_seed(seed))
    plain = batch_loss(model, torch.device("cpu"), is_compiled=False)
    factor = {"nan": math.nan, "loss_x100": 100.0}.get(fault or "", 1.0)

    def loss(batch: Batch) -> Tensor:
        return plain(batch) * (factor if batch.num_bytes == -1 else 1.0)

    def held_out() -> dict[str, float]:
        return {"loss": evaluate(model, validation_batches(corpus, batch_size=BATCH, seq_len=SEQ_LEN)).loss}

    task = Task(
        module=model,
        batches=batches(corpus, seed, fault, steps * 3 // 5),
        loss=loss,
        write_model=lambda to, weights: write_model_folder(to, model, weights, tokenizer),
        read_model=lambda path: dict(load_model(path).named_parameters()),
        evaluate=held_out,
    )
    monitor = MonitorConfig(
        spike_z=SPIKE_Z, max_skipped_steps=int(policy == "none"), rewind_on=ALARMS if policy == "rewind" else ()
    )
    settings = Settings(
        TrainConfig(max_steps=steps, eval_every=0, threads=torch.get_num_threads()),
        OptimConfig(lr=3e-3, grad_clip=0.0),
        ScheduleConfig(warmup_steps=20),
        CheckpointConfig(save_every=steps // 10),
        monitor,
    )
    outcome = fit(task, settings, Run(folder, {}))
    events = list(RunFolder(folder).read_events())
    alarms = [event for event in events if event.kind in ALARMS]
    at = [event.step for event in alarms if event.step == steps * 3 // 5]
    assert outcome.last_record is not None
    assert outcome.last_record.held_out is not None
    return {
        "held_out_loss": outcome.last_record.held_out["loss"],
        "seen_before_the_update": bool(at) if fault else None,
        "alarms": len(alarms),
        "rewinds": sum(event.kind == "rewound" for event in events),
    }


def main() -> None:
    """Run every fault with and without a rewind, and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    parsed = arguments.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name))
        for seed in range(parsed.seeds):
            cases = [(None, "none"), *((fault, policy) for fault in FAULTS for policy in ("none", "rewind"))]
            for fault, policy in cases:
                folder = Path(name) / f"{seed}-{fault}-{policy}"
                found = run(corpus, folder, seed=seed, steps=parsed.steps, fault=fault, policy=policy)
                rows.append({"seed": seed, "fault": fault, "policy": policy, **found})
                print(json.dumps(rows[-1]), flush=True)
    clean = {row["seed"]: row["held_out_loss"] for row in rows if row["fault"] is None}
    for row in rows:
        row["relative_to_clean"] = row["held_out_loss"] / clean[row["seed"]] - 1
    for fault in FAULTS:
        for policy in ("none", "rewind"):
            worst = [row["relative_to_clean"] for row in rows if (row["fault"], row["policy"]) == (fault, policy)]
            print(f"{fault:<14} {policy:<7} median {statistics.median(worst):+.2%}, worst {max(worst):+.2%}")
    if parsed.json:
        parsed.json.write_text(json.dumps({"steps": parsed.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Train, tune and generate on the phantom device and on the CPU, and print what was seen: `phantom_program.py FOLDER`.

A program of its own, because torch counts the devices of a process at its first backward.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.inference_mode = lambda *_, **__: torch.no_grad()  # type: ignore[assignment, misc]  # it refuses wrappers

import numpy as np
from phantom import NAME, phantom_device

from entrenar import recipe
from entrenar.config import FinetuneConfig, RunConfig
from entrenar.config_file import load_config, load_finetune_config
from entrenar.data import PrepareConfig, Tokenizer, prepare, train_bpe
from entrenar.infer import GenerateConfig, generate
from entrenar.interop import load_model
from entrenar.model import Llama, LlamaConfig
from entrenar.recipe import Observer, start
from entrenar.runs import StepRecord

VOCAB_SIZE = 300
STEPS = 4
PRETRAINING = {
    "float32": {},
    "bfloat16 adamw8bit selective": {
        "train.precision": "bfloat16", "optim.optimizer": "adamw8bit", "train.checkpointing": "selective",
    },
    "bfloat16 muon full": {"train.precision": "bfloat16", "optim.optimizer": "muon", "train.checkpointing": "full"},
}  # fmt: skip
FINETUNING = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "lora with trunk cache": {"method": "lora", "lora.layers": "top:1", "trunk.cache_trunk": "true"},
    "qlora": {"method": "qlora"},
}


def make_inputs(folder: Path) -> None:
    """Write a corpus, and a model in bfloat16 with rows to tune it on."""
    words = np.random.default_rng(0).choice(["def", "return", "value", "self", "for", "in"], size=(300, 20))
    (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    options = PrepareConfig(vocab_size=VOCAB_SIZE, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", options)
    tokenizer = train_bpe([" ".join(row) for row in words], VOCAB_SIZE)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(torch.bfloat16)
    recipe.write_model_folder(folder / "base", model, dict(model.named_parameters()), tokenizer)
    rows = [{"prompt": f"def value {number} in", "completion": " return self"} for number in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pretraining(folder: Path, runs: Path, flags: dict[str, str]) -> RunConfig:
    """Return a run of a model of two small layers."""
    given = {
        "name": "run", "runs_dir": str(runs), "data.corpus": json.dumps([str(folder / "corpus")]),
        "data.batch_size": "4", "data.seq_len": "32", "model.vocab_size": str(VOCAB_SIZE), "model.hidden_size": "32",
        "model.num_layers": "2", "model.num_heads": "4", "model.num_kv_heads": "2", "model.intermediate_size": "64",
        "model.max_seq_len": "64", "train.max_steps": str(STEPS), "optim.lr": "0.01", "train.eval_every": "0",
        "train.threads": "1", "train.grad_accum_steps": "2", "checkpoint.save_every": "0", "compute_dtype": "float32",
    }  # fmt: skip
    return load_config(None, given | flags)


def finetuning(folder: Path, runs: Path, flags: dict[str, str]) -> FinetuneConfig:
    """Return a tuning run over the base."""
    given = {
        "name": "run", "runs_dir": str(runs), "model": str(folder / "base"), "sft.data": str(folder / "rows.jsonl"),
        "train.max_steps": str(STEPS), "optim.lr": "0.01", "train.precision": "bfloat16", "compute_dtype": "float32",
        "train.threads": "1", "task.sample_answers": "0", "sft.eval_fraction": "0", "train.eval_every": "0",
    }  # fmt: skip
    if "trunk.cache_trunk" in flags:
        given["trunk.trunk_dir"] = str(runs / "trunk")
    return load_finetune_config(None, given | flags)


def compared(runs: Path, run: Callable[[Path, Observer], object]) -> dict[str, Any]:
    """Run on both devices; return what was seen on the phantom, and how far its losses are from the CPU's."""
    choose_device = start.choose_device
    start.choose_device = lambda _: torch.device(NAME)
    waits: list[int] = []
    losses: list[float] = []
    expected: list[float] = []

    def note(record: StepRecord) -> None:
        waits.append(sum(seen.waits.values()))
        losses.append(record.loss)

    try:
        with phantom_device() as seen:
            run(runs / "phantom", Observer(on_record=note))
            report = {"mixed": seen.mixed.copy(), "places": dict(seen.waits), "waits": waits}
    finally:
        start.choose_device = choose_device
    run(runs / "cpu", Observer(on_record=lambda record: expected.append(record.loss)))
    return report | {"differences": [abs(a / b - 1) for a, b in zip(losses, expected, strict=True)]}


def resumed(folder: Path, runs: Path, observer: Observer) -> None:
    """Train for two steps, and then for the rest."""
    recipe.train(pretraining(folder, runs, {"train.max_steps": "2"}), observer=observer)
    recipe.train(pretraining(folder, runs, {}), resume=True, allow_changes=True, observer=observer)


def generated(folder: Path) -> dict[str, Any]:
    """Generate for two prompts at once on both devices."""

    def load() -> Llama:
        return load_model(folder / "base")

    model, tokenizer = load(), Tokenizer.load(folder / "base")
    prompts, config = [tokenizer.encode("def value"), tokenizer.encode("in")], GenerateConfig(max_new_tokens=6)
    with phantom_device() as seen:
        found = list(generate(model.to(NAME), prompts, config))
        report = {"mixed": seen.mixed.copy(), "places": dict(seen.waits)}
    return report | {"steps": len(found), "is_text_equal": found == list(generate(load(), prompts, config))}


def planted() -> dict[str, Any]:
    """Mix the devices once, and wait once."""
    with phantom_device() as seen:
        (torch.ones(3, device=NAME) + torch.ones(3)).sum().item()
        return {"mixed": seen.mixed.copy(), "places": dict(seen.waits)}


def main() -> None:
    """Take every road."""
    folder = Path(sys.argv[1])
    make_inputs(folder)
    report = {}
    for name, flags in PRETRAINING.items():
        report[f"pretraining {name}"] = compared(
            folder / name, lambda runs, to, flags=flags: recipe.train(pretraining(folder, runs, flags), observer=to)
        )
    for name, flags in FINETUNING.items():
        report[f"tuning {name}"] = compared(
            folder / name,
            lambda runs, seen, flags=flags: recipe.finetune(finetuning(folder, runs, flags), observer=seen),
        )
    report["resuming"] = compared(folder / "resumed", lambda runs, seen: resumed(folder, runs, seen))
    report |= {"generating": generated(folder), "planted": planted()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Train a tiny model in float64 as one of several ranks, once for each job of the argument; resumes what is there."""

import json
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from entrenar.data import Example, SftLoader, SftState
from entrenar.errors import NonFiniteError
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.peft import LoraConfig, from_base, put_quantized, quantize_weight
from entrenar.runs import list_checkpoints
from entrenar.scale import ScaleConfig, joined, shard
from entrenar.train import (
    CheckpointConfig,
    MonitorConfig,
    OptimConfig,
    Run,
    ScheduleConfig,
    Settings,
    Task,
    TrainConfig,
    World,
    fit,
    latest_good,
    seed_all,
)
from entrenar.train.precision import GradientSums
from entrenar.train.step import RowLimit, StepGradient

BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 12, 24, 65


def examples() -> list[Example]:
    """Return rows of unequal lengths, with unequal numbers of targets."""
    random = np.random.default_rng(1)
    lengths = random.integers(4, SEQ_LEN, size=47)
    made = []
    for number, length in enumerate(lengths):
        is_trained = np.arange(length) >= random.integers(1, length)
        made.append(Example(f"row:{number}", random.integers(0, VOCAB_SIZE, length).astype(np.int32), is_trained))
    return made


def model(method: str) -> Llama:
    """Return the model in float64 with its adapter, if it has one."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64,
        max_seq_len=SEQ_LEN, tie_word_embeddings=method == "tied",
    )  # fmt: skip
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(0))
    made.double()
    made.set_compute_dtype(torch.float64)
    if method == "qlora":
        for name, parameter in list(made.named_parameters()):
            if name.endswith("_proj.weight"):
                weight = quantize_weight(name, parameter.detach().float(), "nf4")
                put_quantized(made, name.removesuffix(".weight"), weight, torch.float64)
    if method in ("lora", "qlora"):
        from_base(made, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    for parameter in made.parameters():
        parameter.data = parameter.data.double() if parameter.requires_grad else parameter.data
    return made


def weights_in(place: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all files in a folder."""
    return {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}


def train(job: dict[str, Any], world: World) -> None:
    """Train up to `steps` as one rank of `world`; leave the next batch's gradients next to the run."""
    folder = Path(job["folder"])
    seed_all(0)
    module = model(job["method"])
    resumed = latest_good(folder / "checkpoints") if list_checkpoints(folder / "checkpoints") else None
    loader = SftLoader(
        examples(), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0, batching=job["batching"], rank=world.rank,
        world_size=world.size, start=SftState.from_dict(resumed.loader_state) if resumed else None,
    )  # fmt: skip
    world.any(flag=False)  # all have read the checkpoint before the writer sets newer ones aside
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    settings = Settings(
        TrainConfig(max_steps=job["steps"], eval_every=7, log_every=1, grad_accum_steps=2),
        OptimConfig(lr=1e-3, grad_clip=1.0), ScheduleConfig(schedule="constant", warmup_steps=2),
        CheckpointConfig(save_every=7), MonitorConfig(),
    )  # fmt: skip
    world = shard(module, ScaleConfig(**job["scale"]), world, settings.train, settings.optim)
    loss, calls = batch_loss(module, torch.device("cpu")), count()
    held_out = next(iter(SftLoader(examples(), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=1, batching="padded")))[0]
    task = Task(
        module=module,
        batches=iter(loader),
        loss=lambda batch: loss(batch) * (float("nan") if next(calls) >= 6 and job["nan_on"] == world.rank else 1.0),
        write_model=lambda place, weights: save_file(
            {name: weight for name, weight in weights.items() if name in names}, place / "model.safetensors"
        ),
        write_index=None if job["method"] in ("lora", "qlora") else lambda *_: None,
        read_model=weights_in,
        evaluate=lambda: {"loss": float(loss(held_out))},
        micro_batches_per_epoch=loader.batches_per_epoch,
    )
    try:
        fit(task, settings, Run(folder, {}, resumed), world)
    except NonFiniteError as error:
        (folder / f"error-{world.rank}").write_text(str(error))
        return
    sums = GradientSums(p for p in module.parameters() if p.requires_grad)
    step = StepGradient(task.loss, sums, RowLimit(), world, lambda _: nullcontext(), lambda _: None)
    step.take([next(task.batches)[0]])
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    if world.pieces is not None:
        gradients = {name: world.pieces.whole(gradient, 0) for name, gradient in gradients.items()}
    if world.is_writer:
        save_file({name: g.contiguous() for name, g in gradients.items()}, folder / "gradients.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(60) as ranks:
        for each in json.loads(sys.argv[1]):
            train(each, ranks)

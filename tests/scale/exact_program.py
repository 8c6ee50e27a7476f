"""Train a tiny model in float64 as one of several ranks: FOLDER METHOD BATCHING STEPS; resumes what is there."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from entrenar.data import Example, SftLoader, SftState
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.peft import LoraConfig, from_base, put_quantized, quantize_weight
from entrenar.runs import list_checkpoints
from entrenar.scale import joined
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
    latest_good,
    seed_all,
)
from entrenar.train.precision import GradientSums
from entrenar.train.step import RowLimit, StepGradient

BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 6, 24, 64


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
        max_seq_len=SEQ_LEN,
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
    if method != "full":
        from_base(made, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    for parameter in made.parameters():
        parameter.data = parameter.data.double() if parameter.requires_grad else parameter.data
    return made


def main(folder: Path, method: str, batching: str, steps: int) -> None:
    """Train up to `steps`; leave the next batch's gradients next to the run."""
    torch.set_num_threads(1)
    with joined(60) as world:
        seed_all(0)
        module = model(method)
        resumed = latest_good(folder / "checkpoints") if list_checkpoints(folder / "checkpoints") else None
        loader = SftLoader(
            examples(), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0, batching=batching, rank=world.rank,
            world_size=world.size, start=SftState.from_dict(resumed.loader_state) if resumed else None,
        )  # fmt: skip
        world.any(flag=False)  # all have read the checkpoint before the writer sets newer ones aside
        names = {name for name, p in module.named_parameters() if p.requires_grad}
        task = Task(
            module=module,
            batches=iter(loader),
            loss=batch_loss(module, torch.device("cpu")),
            write_model=lambda place, weights: save_file(
                {name: weight for name, weight in weights.items() if name in names}, place / "model.safetensors"
            ),
            read_model=lambda place: load_file(place / "model.safetensors"),
            micro_batches_per_epoch=loader.batches_per_epoch,
        )
        settings = Settings(
            TrainConfig(max_steps=steps, eval_every=0, log_every=1, grad_accum_steps=2),
            OptimConfig(lr=1e-3, grad_clip=1.0), ScheduleConfig(schedule="constant", warmup_steps=2),
            CheckpointConfig(save_every=0), MonitorConfig(),
        )  # fmt: skip
        fit(task, settings, Run(folder, {}, resumed), world)
        sums = GradientSums(p for p in module.parameters() if p.requires_grad)
        step = StepGradient(task.loss, sums, RowLimit(), world, lambda _: nullcontext(), lambda _: None)
        step.take([next(task.batches)[0]])
        if world.is_writer:
            gradients = {name: p.grad.contiguous() for name, p in module.named_parameters() if p.requires_grad}
            save_file(gradients, folder / "gradients.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))

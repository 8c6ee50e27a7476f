"""What a budget of bits costs: a base as it is, in NF4, and at 3.9 bits a weight, before and after equal LoRA steps.

    python benchmarks/bit_budget.py NAME MODEL TEXT [--tokenizer FILE] [--calibration TEXT]

Each variant gets the same first adapter, the same batches and the same held-out rows of TEXT (a text file, or a JSON
list of rows whose texts are joined). Storage is counted from the tensors that the base holds. Figures are added to
benchmarks/results/bit_budget.json under NAME. The last two are also trained with an adapter that begins by LoftQ; then
the budget is rounded for it. Calibration is on the training rows' own text unless another is given.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import turns
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.interop import load_model
from entrenar.interop.convert import Target, convert
from entrenar.interop.source import Source, open_source
from entrenar.model import Llama
from entrenar.ops import fastest_compute_dtype
from entrenar.peft import LoraConfig, find_targets, from_base
from entrenar.peft.lora import OriginalWeight
from entrenar.quantize import Adapters
from entrenar.recipe.base import original_weights
from entrenar.recipe.bit_budget import round_to_budget
from entrenar.train import OptimConfig, build_optimizer

ROW, TARGETS = 256, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(rank=8, lora_alpha=16, target_modules=TARGETS)


def rows_of(path: Path, tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """Return the first rows of tokens of a text."""
    text = path.read_text(encoding="utf-8").replace("<|endoftext|>", "")
    if path.suffix == ".json":
        text = "\n\n".join("\n".join(map(str, row.values())) for row in json.loads(text))
    ids = torch.tensor(tokenizer.encode(text[: 16 * count * length]))
    return ids[: len(ids) // length * length].view(-1, length)[:count]


def held_out_loss(model: Llama, rows: Tensor) -> float:
    """Return the mean loss of a target."""
    with torch.no_grad():
        parts = torch.split(rows, 8)
        return sum(float(model.loss(part[:, :-1], part[:, 1:])) for part in parts) / rows[:, 1:].numel()


def storage_bytes(model: Llama) -> int:
    """Return the bytes of every tensor that the base consists of, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(storages.values())


def adapt(model: Llama, original: OriginalWeight | None) -> None:
    """Give the base an adapter, which begins by LoftQ where there are original weights."""
    config = LORA if original is None else LORA.model_copy(update={"lora_init": "loftq"})
    from_base(model, config, torch.Generator().manual_seed(0), original=original)


def fine_tune(model: Llama, rows: Tensor, parsed: argparse.Namespace) -> None:
    """Train the adapter on the rows in order, over and over."""
    steps, batch_size, lr = parsed.steps, parsed.batch_size, parsed.lr
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=lr, weight_decay=0.0, beta2=0.999), "float32")
    for step in range(steps):
        batch = rows[[(step * batch_size + row) % len(rows) for row in range(batch_size)]]
        optimizer.gradients.begin(1)
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        count = batch[:, 1:].numel()
        norm = float(optimizer.gradient_norm()) / count
        optimizer.step(lr * min(1.0, 2 * (1 - step / steps)), min(1.0, 1.0 / norm) / count)


def variants(source: Source, folder: Path, bits: float, calibration: Path, turns: int) -> dict[str, dict[str, Any]]:
    """Write each base and return where it lies and what making it took."""
    made: dict[str, dict[str, Any]] = {}
    ranks = dict.fromkeys(find_targets(source.model, LORA), LORA.rank)
    adapters = {"budget": Adapters({}, 0)} | ({"budget, LoftQ": Adapters(ranks, turns)} if turns else {})
    origins: dict[str, Source] = {}
    for name, made_for in adapters.items():  # they need a backward, and verifying leaves a model without
        started = time.process_time()
        origins[name], budget = round_to_budget(source, bits, calibration, print, made_for)
        made[name] = {"bits": budget.bits, "expected_rise": budget.expected_rise, "widths": dict(budget.widths)}
        made[name]["round_cpu_s"] = time.process_time() - started
    for name in (*adapters, "nf4", "bfloat16"):
        started, origin = time.process_time(), origins.get(name, source)
        target = Target(
            folder / name,
            "hf" if name == "bfloat16" else "nf4",
            None if name in origins else "bf16",
            accepts_tokenizer_differences=True,
        )
        report = convert(origin, target)
        made.setdefault(name, {}).update(kl=report.kl, top1=report.top1, convert_cpu_s=time.process_time() - started)
    return made | ({"nf4, LoftQ": dict(made["nf4"])} if turns else {})


def measure(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model."""
    source = open_source(parsed.model, parsed.tokenizer)
    assert source.tokenizer is not None
    source.model.to(torch.bfloat16)
    length = min(ROW, source.model.config.context_length - 1) + 1
    rows = rows_of(parsed.text, source.tokenizer, parsed.train_rows + parsed.held_out, length)
    train, held_out = rows[: parsed.train_rows], rows[parsed.train_rows :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "calibration.txt"
        text.write_text(source.tokenizer.decode(train.flatten().tolist()), encoding="utf-8")
        figures = variants(source, folder, parsed.bits, parsed.calibration or text, parsed.loftq_turns)
        numbers = sum(parameter.numel() for parameter in source.model.parameters())
        for name, found in figures.items():
            base = folder / ("nf4" if name.startswith("nf4") else name)
            model = load_model(base, dtype=torch.bfloat16)
            found["storage_bytes"] = storage_bytes(model)
            found["bits_per_weight"] = 8 * found["storage_bytes"] / numbers
            # Stored as it is, computed in float32: what is compared is the base, not the rounding of activations.
            model = load_model(base, dtype=torch.float32)
            model.set_compute_dtype(fastest_compute_dtype(torch.float32, torch.device("cpu")))
            adapt(model, original_weights(folder / "bfloat16") if "LoftQ" in name else None)
            found["loss_before"] = held_out_loss(model, held_out)
            started = time.process_time()
            fine_tune(model, train, parsed)
            found["train_cpu_s"] = time.process_time() - started
            found["loss_after"] = held_out_loss(model, held_out)
            print(name, {key: value for key, value in found.items() if key != "widths"}, flush=True)
    base = figures["bfloat16"]
    return {
        **turns.machine(),
        "weights": numbers,
        "text": parsed.text.name,
        "bits": parsed.bits,
        "loftq_turns": parsed.loftq_turns,
        "steps": parsed.steps,
        "tokens_a_step": parsed.batch_size * (length - 1),
        "held_out_targets": held_out[:, 1:].numel(),
        "lr": parsed.lr,
        "below_bfloat16": {name: 1 - found["storage_bytes"] / base["storage_bytes"] for name, found in figures.items()},
        "loss_over_lora": {name: found["loss_after"] / base["loss_after"] for name, found in figures.items()},
        "variants": figures,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("name")
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--tokenizer", type=Path)
    arguments.add_argument("--calibration", type=Path)
    arguments.add_argument("--bits", type=float, default=3.9)
    arguments.add_argument("--loftq-turns", type=int, default=5, help="0: without the variant that begins by LoftQ")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--train-rows", type=int, default=400)
    arguments.add_argument("--held-out", type=int, default=64)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--threads", type=int, default=1)
    parsed = arguments.parse_args()
    torch.set_num_threads(parsed.threads)
    path = turns.RESULTS / "bit_budget.json"
    measured = measure(parsed)
    # Read only now: another run may have added its figures meanwhile.
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result[parsed.name] = measured
    turns.write_result("bit_budget", result)
    print(json.dumps({key: value for key, value in result[parsed.name].items() if key != "variants"}, indent=2))


if __name__ == "__main__":
    main()

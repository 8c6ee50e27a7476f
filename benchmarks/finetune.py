"""Fine-tuning, side by side in turns: ours against peft, adapters over a cached trunk against full, packing on and off.

    python benchmarks/finetune.py peft    --data alpaca.json --tokenizer DIR     LoRA here and in peft + transformers
    python benchmarks/finetune.py step    --data alpaca.json --model DIR         full against LoRA on all layers
    python benchmarks/finetune.py trunk   --data rows.jsonl --model DIR          full against LoRA over a cached trunk
    python benchmarks/finetune.py layout  --data alpaca.json --tokenizer DIR     packing, and the head on answers only

Each worker makes one pass over the same examples in a round and then measures the same held-out examples; only the
pass is timed. `peft` gets the very batches that ours gets (grouped by length, labels masked), the same first values of
the adapter, and AdamW with the same settings. Without --model the weights are random: good for time and memory, and
for the equality of two losses, but not for what a task can be taught. `--quick` is a smoke run of a tiny model.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import turns

PARTS = {
    "peft": ("lora", "peft"),
    "step": ("full", "lora"),
    "trunk": ("full", "cached"),
    "layout": ("packed", "padded", "all_targets"),
}
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Workload:
    """What every worker is given."""

    part: str
    model: str
    data: str
    batching: str
    examples: int
    held_out: int
    batch_size: int
    seq_len: int
    rounds: int
    rank: int
    top: int
    targets: str
    lr: float
    full_lr: float
    precision: str
    threads: int
    clock: str


def _rows(work: Workload, train_on: str = "answers") -> tuple[list[Any], list[Any]]:
    """Return training and held-out examples: the first ones of a split that depends on the content alone."""
    from entrenar.data import SftConfig, Tokenizer, read_examples, split

    config = SftConfig.model_validate({"data": work.data, "seq_len": work.seq_len, "train_on": train_on})
    found = read_examples(config.data, Tokenizer.load(work.model), config).examples
    train, held_out = split(found, 0.1, seed=0)
    return train[: work.examples], held_out[: work.held_out]


def _batches(work: Workload, examples: Sequence[Any], batching: str) -> Iterator[list[Any]]:
    """Yield the batches of one epoch after the other."""
    from entrenar.data import SftLoader

    loader = SftLoader(examples, batch_size=work.batch_size, seq_len=work.seq_len, seed=0, batching=batching)
    stream = iter(loader)
    while True:
        yield [next(stream)[0] for _ in range(loader.batches_per_epoch)]


def _lora_config(work: Workload, layers: str) -> Any:
    from entrenar.peft import LoraConfig

    targets = tuple(work.targets.split(","))
    return LoraConfig(rank=work.rank, lora_alpha=2 * work.rank, target_modules=targets, layers=layers)


def _open_ours(work: Workload, mode: str) -> Any:
    import torch

    from entrenar.interop import load_model
    from entrenar.ops import fastest_compute_dtype
    from entrenar.peft import from_base

    stored = getattr(torch, work.precision)
    model = load_model(Path(work.model), dtype=torch.float32 if mode == "full" else stored)
    model.set_compute_dtype(fastest_compute_dtype(stored, torch.device("cpu")))
    if mode != "full":
        layers = f"top:{work.top}" if mode == "cached" else "all"
        from_base(model, _lora_config(work, layers), torch.Generator().manual_seed(0))
    return model


def serve_ours(work: Workload, mode: str) -> None:
    """Answer each round with one epoch of ours."""
    import torch

    from entrenar.data import Tokenizer, held_out_batches
    from entrenar.peft import TrunkCache, TrunkConfig
    from entrenar.train import OptimConfig, build_optimizer, keep_freed_memory

    torch.set_num_threads(work.threads)
    imports = turns.rss_bytes()
    keep_freed_memory()
    model = _open_ours(work, mode)
    lr = work.full_lr if mode == "full" else work.lr
    config = OptimConfig(lr=lr, weight_decay=0.0, beta2=0.999)
    optimizer = build_optimizer(model.named_parameters(), config, work.precision)
    train, held_out = _rows(work)
    if mode == "all_targets":
        train, _ = _rows(work, "all")
    batching = {"packed": "packed", "all_targets": "packed", "padded": "padded"}.get(mode, work.batching)
    epochs = _batches(work, train, batching)
    folder = tempfile.TemporaryDirectory()
    loss_of: Callable[..., Any] = model.loss
    steps_left = _steps_of_all_rounds(work, train, batching)
    if mode == "cached":
        trunk = TrunkConfig(cache_trunk=True, trunk_dir=Path(folder.name), trunk_checks=0)
        loss_of = TrunkCache(model, trunk, tokenizer_hash=Tokenizer.load(work.model).hash).loss

    def loss(batch: Any) -> Any:
        return loss_of(batch.input_ids, batch.targets, documents=batch.documents)

    def step(batch: Any) -> float:
        optimizer.gradients.begin(1)
        total = loss(batch)
        total.backward()
        norm = float(optimizer.gradient_norm()) / batch.num_targets
        optimizer.step(lr * next(steps_left), min(1.0, 1.0 / norm) / batch.num_targets)
        return float(total.detach()) / batch.num_targets

    def evaluate() -> float:
        batches = list(held_out_batches(held_out, batch_size=work.batch_size, seq_len=work.seq_len))
        with torch.no_grad():
            return sum(float(loss(batch)) for batch in batches) / sum(batch.num_targets for batch in batches)

    _serve_epochs(work, epochs, step, evaluate, imports)


def _steps_of_all_rounds(work: Workload, train: Sequence[Any], batching: str) -> Iterator[float]:
    """Yield what the learning rate of each step is multiplied by: over a trunk, it falls in a line to a tenth."""
    from entrenar.data import SftLoader

    if work.part != "trunk":
        return repeat(1.0)
    epoch = SftLoader(train, batch_size=work.batch_size, seq_len=work.seq_len, seed=0, batching=batching)
    total = epoch.batches_per_epoch * work.rounds
    return (1 - 0.9 * step / total for step in range(total))


def serve_peft(work: Workload) -> None:
    """Answer each round with one epoch of peft over transformers, on the same batches from the same adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from entrenar.interop.hf_peft import save_adapter
    from peft import PeftModel

    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        first = _open_ours(work, "lora")
        save_adapter(Path(folder), first, _lora_config(work, "all"))
        del first
        imports = turns.rss_bytes()
        dtype = getattr(torch, work.precision)
        base = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, attn_implementation="sdpa")
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0, betas=(0.9, 0.999), fused=True)
    train, held_out = _rows(work)
    epochs = _batches(work, train, work.batching)

    def loss(batch: Any) -> Any:
        ends = torch.tensor([spans[0][1] for spans in batch.documents])
        is_token = (torch.arange(batch.input_ids.shape[1]) < ends[:, None]).long()
        labels = torch.cat([torch.full_like(batch.targets[:, :1], -100), batch.targets[:, :-1]], dim=1)
        # The last target has no place in labels that are shifted inside; one more column makes it.
        ids = torch.cat([batch.input_ids, batch.targets[:, -1:].clamp_min(0)], dim=1)
        labels = torch.cat([labels, batch.targets[:, -1:]], dim=1)
        mask = torch.cat([is_token, (batch.targets[:, -1:] >= 0).long()], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "bfloat16"):
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def step(batch: Any) -> float:
        mean = loss(batch)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(mean.detach())

    def evaluate() -> float:
        from entrenar.data.sft.loader import make_batch

        batches = [make_batch([[example]]) for example in held_out]
        model.eval()
        with torch.no_grad():
            total = sum(float(loss(batch)) * batch.num_targets for batch in batches)
        model.train()
        return total / sum(batch.num_targets for batch in batches)

    _serve_epochs(work, epochs, step, evaluate, imports)


def _serve_epochs(
    work: Workload,
    epochs: Iterator[list[Any]],
    step: Callable[[Any], float],
    evaluate: Callable[[], float],
    imports: int,
) -> None:
    now = time.process_time if work.clock == "cpu" else time.perf_counter

    def epoch() -> dict[str, Any]:
        batches = next(epochs)
        started, elapsed_s, losses = now(), [], []
        for batch in batches:
            began = now()
            losses.append(step(batch))
            elapsed_s.append(now() - began)
        return {
            "epoch_s": now() - started,
            "steps_s": elapsed_s,
            "tokens": [_real_tokens(batch) for batch in batches],
            "positions": sum(batch.input_ids.numel() for batch in batches),
            "targets": sum(batch.num_targets for batch in batches),
            "train_loss": statistics.fmean(losses),
            "held_out_loss": evaluate(),
            "peak_bytes": turns.peak_rss_bytes(),
            "imports_bytes": imports,
        }

    turns.serve(epoch)


def _real_tokens(batch: Any) -> int:
    """Count the tokens of documents that have a target; the rest is padding."""
    count = 0
    for spans, targets in zip(batch.documents, batch.targets, strict=True):
        count += sum(end - start for start, end in spans if (targets[start:end] != -100).any())
    return count


def _tokens_per_s(answers: Sequence[dict[str, Any]]) -> float:
    """Return the rate over all steps but the first ones."""
    pairs = [pair for answer in answers for pair in zip(answer["tokens"], answer["steps_s"], strict=True)]
    pairs = pairs[min(WARMUP_STEPS, len(pairs) - 1) :]
    return sum(tokens for tokens, _ in pairs) / sum(elapsed_s for _, elapsed_s in pairs)


def _added(answers: Sequence[dict[str, Any]]) -> int:
    return int(answers[-1]["peak_bytes"] - answers[-1]["imports_bytes"])


def summarize(work: Workload, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of a part."""
    result: dict[str, Any] = {
        "tokens_per_s": {name: round(_tokens_per_s(some), 1) for name, some in answers.items()},
        "held_out_loss": {name: [round(one["held_out_loss"], 4) for one in some] for name, some in answers.items()},
        "added_peak_bytes": {name: _added(some) for name, some in answers.items()},
    }
    rate = result["tokens_per_s"]
    if work.part == "peft":
        ours, theirs = (answers[name][-1]["held_out_loss"] for name in ("lora", "peft"))
        result["speed_over_peft"] = round(rate["lora"] / rate["peft"], 3)
        result["held_out_over_peft"] = round(ours / theirs, 5)
        result["added_peak_over_peft"] = round(_added(answers["lora"]) / _added(answers["peft"]), 3)
    elif work.part == "step":
        result["step_gain_at_equal_tokens"] = round(turns.median_ratio(*_epochs(answers, "full", "lora")), 2)
    elif work.part == "trunk":
        result |= _trunk(answers)
    else:
        result["packing_gain"] = round(rate["packed"] / rate["padded"], 3)
        result["answers_only_gain"] = round(rate["packed"] / rate["all_targets"], 3)
        result["positions_per_token"] = {
            name: round(some[0]["positions"] / sum(some[0]["tokens"]), 3) for name, some in answers.items()
        }
    return result


def _epochs(answers: dict[str, list[dict[str, Any]]], *names: str) -> list[list[float]]:
    """Return the time of every epoch but the first, which warms up or fills a cache."""
    return [[answer["epoch_s"] for answer in answers[name][1:]] for name in names]


def _trunk(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what a cached trunk gains against full fine-tuning: a filled epoch, and the time to full's best loss."""
    best = min(one["held_out_loss"] for one in answers["full"])
    full_until = _time_until(answers["full"], best)
    assert full_until is not None
    answers = answers | {"cached, filled before": _as_if_filled(answers["cached"])}
    until = {name: _time_until(some, 1.01 * best) for name, some in answers.items()}
    return {
        "filled_epoch_gain": round(turns.median_ratio(*_epochs(answers, "full", "cached")), 2),
        "first_epoch_s": {name: round(some[0]["epoch_s"], 2) for name, some in answers.items()},
        "best_loss": {name: min(one["held_out_loss"] for one in some) for name, some in answers.items()},
        "seconds_of_full_to_its_best": full_until,
        "seconds_to_within_1_percent": until,
        "time_to_quality_gain": {
            name: None if some is None else round(full_until / some, 2) for name, some in until.items()
        },
    }


def _as_if_filled(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the epochs of a run that finds the cache filled, as every run of a sweep but the first does."""
    filled = statistics.median(answer["epoch_s"] for answer in answers[1:])
    return [answers[0] | {"epoch_s": filled}, *answers[1:]]


def _time_until(answers: Sequence[dict[str, Any]], loss: float) -> float | None:
    """Return the training time up to the first evaluation at or below `loss`; None if there is none."""
    elapsed_s = 0.0
    for answer in answers:
        elapsed_s += answer["epoch_s"]
        if answer["held_out_loss"] <= loss:
            return elapsed_s
    return None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=PARTS)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--model", help="a model folder or a run; random weights when not given")
    arguments.add_argument("--tokenizer", help="tokenizer of the random model")
    arguments.add_argument("--preset", default="124m")
    arguments.add_argument("--examples", type=int, default=64)
    arguments.add_argument("--held-out", type=int, default=32)
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--rounds", type=int, help="epochs (default: 2; trunk: 10)")
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--top", type=int, default=2, help="layers with adapters over the cached trunk")
    arguments.add_argument("--targets", default="q_proj,v_proj")
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--full-lr", type=float, default=1e-4)
    arguments.add_argument("--precision", choices=("bfloat16", "float32"), default="float32")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy")
    arguments.add_argument("--quick", action="store_true", help="a smoke run: tiny model, 12 examples, nothing written")
    arguments.add_argument("--worker", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    parsed = arguments.parse_args()
    if parsed.worker:
        name, work = parsed.worker[0], Workload(**json.loads(parsed.worker[1]))
        if name == "peft":
            serve_peft(work)
        else:
            serve_ours(work, name)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = _workload(parsed)
        if parsed.model is None:
            from make_llama import random_model

            preset = "tiny" if parsed.quick else parsed.preset
            work = replace(work, model=str(random_model(Path(folder), preset, parsed.tokenizer)))
        result = _measure(work, parsed.model)
    if parsed.quick:
        print(json.dumps({key: value for key, value in result.items() if key != "raw"}, indent=2))
    else:
        print(turns.write_result(f"finetune_{parsed.part}", result).read_text())


def _workload(parsed: argparse.Namespace) -> Workload:
    from entrenar.recipe import model_folder

    values = {name: getattr(parsed, name) for name in Workload.__annotations__ if hasattr(parsed, name)}
    values["batching"] = "grouped" if parsed.part == "peft" else "packed"
    values["rounds"] = parsed.rounds or (10 if parsed.part == "trunk" else 2)
    values["model"] = str(model_folder(Path(parsed.model))) if parsed.model else ""
    if parsed.quick:
        values |= {"examples": 12, "held_out": 4, "seq_len": 256, "rounds": 3, "threads": 1}
    return Workload(**values)


def _measure(work: Workload, trained: str | None) -> dict[str, Any]:
    workers = [
        turns.Worker(name, [__file__, work.part, "--data", work.data, "--worker", name, json.dumps(asdict(work))])
        for name in PARTS[work.part]
    ]
    answers = turns.in_turns(workers, work.rounds, warmup=0)
    shown = {key: value for key, value in asdict(work).items() if key not in ("model", "data")}
    weights = "trained weights" if trained else "random weights"
    return {**turns.machine(), "workload": shown, "weights": weights, **summarize(work, answers), "raw": answers}


if __name__ == "__main__":
    main()

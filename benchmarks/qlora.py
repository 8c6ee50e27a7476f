"""QLoRA, side by side in turns: a step against peft over bitsandbytes, and what four bits cost in held-out loss.

    python benchmarks/qlora.py step    --tokenizer DIR                         time and memory of a step, random weights
    python benchmarks/qlora.py quality --model DIR --data alpaca.json          QLoRA and LoRA after the same steps

In `step` each worker opens the same bfloat16 folder in its own way, quantizes it while loading, and takes optimizer
steps on the same random tokens: ours, and peft over transformers and bitsandbytes with products in bfloat16 and in
float32 (the faster one is compared). Its peak is the kernel's own (VmHWM), less what imports took before the model was
opened. In `quality` both runs have the same rows, order, first adapter, learning rate and number of steps. `--quick` is
a smoke run of a tiny model.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR = 2e-4


def _now(clock: str) -> float:
    return time.process_time() if clock == "cpu" else time.perf_counter()


def _open_ours(work: dict[str, Any], *, is_quantized: bool) -> Any:
    import torch

    from entrenar.interop import load_model
    from entrenar.ops import fastest_compute_dtype
    from entrenar.peft import LoraConfig, from_base

    stored = torch.bfloat16
    model = load_model(Path(work["model"]), dtype=stored, quantize=is_quantized)
    model.set_compute_dtype(fastest_compute_dtype(stored, torch.device("cpu")))
    lora = LoraConfig(rank=work["rank"], lora_alpha=2 * work["rank"], target_modules=TARGETS, lora_dropout=0.0)
    from_base(model, lora, torch.Generator().manual_seed(0))
    return model


def _ids(work: dict[str, Any], vocab_size: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (work["batch_size"], work["seq_len"] + 1), generator=generator)


def _ours_step(work: dict[str, Any], *, is_quantized: bool) -> Callable[[], float]:
    from entrenar.train import OptimConfig, build_optimizer

    model = _open_ours(work, is_quantized=is_quantized)
    model.checkpointing = work["checkpointing"]
    ids = _ids(work, model.config.vocab_size)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=LR, weight_decay=0.0), "bfloat16")
    targets = ids[:, 1:].numel()

    def step() -> float:
        optimizer.gradients.begin(1)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        norm = float(optimizer.gradient_norm()) / targets
        optimizer.step(LR, min(1.0, 1.0 / norm) / targets)
        return float(loss.detach()) / targets

    return step


def _peft_step(work: dict[str, Any], dtype: Any) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype, quantization_config=four_bits)
    is_checkpointed = work["checkpointing"] == "full"
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=is_checkpointed)
    lora = LoraConfig(r=work["rank"], lora_alpha=2 * work["rank"], target_modules=list(TARGETS), lora_dropout=0.0)
    model = get_peft_model(base, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    ids = _ids(work, base.config.vocab_size)

    def step() -> float:
        labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def serve_step(work: dict[str, Any], name: str) -> None:
    """Answer each round with some steps of one implementation."""
    import torch

    torch.set_num_threads(work["threads"])
    if name.startswith("peft"):
        # Imported before the baseline is taken.
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        from peft import get_peft_model  # noqa: F401

        imports = turns.rss_bytes()
        step = _peft_step(work, torch.bfloat16 if name.endswith("bfloat16") else torch.float32)
    else:
        from entrenar.interop import load_model  # noqa: F401
        from entrenar.peft import from_base  # noqa: F401
        from entrenar.train import build_optimizer, keep_freed_memory  # noqa: F401

        keep_freed_memory()
        imports = turns.rss_bytes()
        step = _ours_step(work, is_quantized=name == "qlora")

    def steps() -> dict[str, Any]:
        elapsed_s = []
        for _ in range(work["steps"]):
            began = _now(work["clock"])
            loss = step()
            elapsed_s.append(_now(work["clock"]) - began)
        return {"loss": loss, "steps_s": elapsed_s, "peak_bytes": turns.peak_rss_bytes(), "imports_bytes": imports}

    turns.serve(steps)


def measure_steps(work: dict[str, Any]) -> dict[str, Any]:
    """Return tokens a second, added peak and their ratios to peft's better variant."""
    names = ["qlora", "lora", "peft_bfloat16", "peft_float32"]
    workers = [turns.Worker(name, [__file__, "step", "--worker", name, json.dumps(work)]) for name in names]
    answers = turns.in_turns(workers, work["rounds"], warmup=1)
    tokens = work["batch_size"] * work["seq_len"]
    best_s = {name: min(min(one["steps_s"]) for one in some) for name, some in answers.items()}
    added = {name: some[-1]["peak_bytes"] - some[-1]["imports_bytes"] for name, some in answers.items()}
    theirs = min(("peft_bfloat16", "peft_float32"), key=best_s.__getitem__)
    return {
        "tokens_per_s": {name: round(tokens / elapsed_s, 1) for name, elapsed_s in best_s.items()},
        "added_peak_bytes": added,
        "loss": {name: round(some[-1]["loss"], 4) for name, some in answers.items()},
        "faster_peft": theirs,
        "speed_over_peft": round(best_s[theirs] / best_s["qlora"], 3),
        "added_peak_over_peft": {
            name: round(added["qlora"] / added[name], 3) for name in ("peft_bfloat16", "peft_float32", "lora")
        },
        "raw": answers,
    }


def serve_quality(work: dict[str, Any], name: str) -> None:
    """Answer each round with some steps over rows, and the held-out loss after them."""
    import torch

    from entrenar.data import SftConfig, SftLoader, Tokenizer, held_out_batches, read_examples, split
    from entrenar.train import OptimConfig, build_optimizer

    torch.set_num_threads(work["threads"])
    model = _open_ours(work, is_quantized=name == "qlora")
    config = SftConfig.model_validate({"data": work["data"], "seq_len": work["seq_len"]})
    examples = read_examples(config.data, Tokenizer.load(work["model"]), config).examples
    train, held_out = split(examples, 0.1, seed=0)
    loader = iter(SftLoader(train, batch_size=work["batch_size"], seq_len=work["seq_len"], seed=0))
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=LR, weight_decay=0.0), "bfloat16")

    def loss_of(batch: Any) -> Any:
        return model.loss(batch.input_ids, batch.targets, documents=batch.documents)

    def evaluate() -> float:
        batches = list(held_out_batches(held_out[: work["held_out"]], batch_size=2, seq_len=work["seq_len"]))
        with torch.no_grad():
            return sum(float(loss_of(batch)) for batch in batches) / sum(batch.num_targets for batch in batches)

    before = evaluate()

    def steps() -> dict[str, Any]:
        for _ in range(work["steps"]):
            batch, _ = next(loader)
            optimizer.gradients.begin(1)
            loss_of(batch).backward()
            norm = float(optimizer.gradient_norm()) / batch.num_targets
            optimizer.step(work["lr"], min(1.0, 1.0 / norm) / batch.num_targets)
        return {"before": before, "held_out_loss": evaluate()}

    turns.serve(steps)


def measure_quality(work: dict[str, Any]) -> dict[str, Any]:
    """Return held-out losses of QLoRA and LoRA after every round, and their ratio at the end."""
    workers = [
        turns.Worker(name, [__file__, "quality", "--worker", name, json.dumps(work)]) for name in ("qlora", "lora")
    ]
    answers = turns.in_turns(workers, work["rounds"], warmup=0)
    losses = {name: [round(one["held_out_loss"], 5) for one in some] for name, some in answers.items()}
    return {
        "held_out_before": {name: round(some[0]["before"], 5) for name, some in answers.items()},
        "held_out_loss": losses,
        "qlora_over_lora": round(losses["qlora"][-1] / losses["lora"][-1], 5),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=("step", "quality"))
    arguments.add_argument("--model", help="a model folder or a run; step: random weights when not given")
    arguments.add_argument("--data")
    arguments.add_argument("--tokenizer", help="tokenizer of the random model")
    arguments.add_argument("--preset", default="124m")
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--seq-len", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=3, help="optimizer steps in a round")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--lr", type=float, default=LR, help="of quality")
    arguments.add_argument("--held-out", type=int, default=48)
    arguments.add_argument("--checkpointing", choices=("none", "full"), default="none")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy")
    arguments.add_argument("--quick", action="store_true", help="a smoke run: tiny model, nothing written")
    arguments.add_argument("--worker", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    parsed = arguments.parse_args()
    if parsed.worker:
        serve = serve_step if parsed.part == "step" else serve_quality
        serve(json.loads(parsed.worker[1]), parsed.worker[0])
        return
    work = {name: value for name, value in vars(parsed).items() if name not in ("worker", "quick", "part")}
    with tempfile.TemporaryDirectory() as folder:
        if parsed.model is None:
            import torch
            from make_llama import random_model

            preset = "tiny" if parsed.quick else parsed.preset
            work["model"] = str(random_model(Path(folder), preset, parsed.tokenizer, torch.bfloat16))
        else:
            from entrenar.recipe import model_folder

            work["model"] = str(model_folder(Path(parsed.model)))
        if parsed.quick:
            work |= {"rounds": 1, "steps": 2, "seq_len": 64}
        measured = (measure_steps if parsed.part == "step" else measure_quality)(work)
    result = {**turns.machine(), "workload": work | {"model": parsed.model or f"random {parsed.preset}"}, **measured}
    if parsed.quick:
        print(json.dumps({key: value for key, value in result.items() if key != "raw"}, indent=2))
    else:
        print(turns.write_result(f"qlora_{parsed.part}", result).read_text())


if __name__ == "__main__":
    main()

"""A training step of the 124m preset, ours against transformers', in turns in one run.

    python benchmarks/train_step.py [--precision bfloat16] [--rounds 5]

transformers: LlamaForCausalLM under bf16 autocast, sdpa attention, fused AdamW, clipping. Ours: the loop's own step.
Peak memory is the kernel's (VmHWM) with the memory after the imports subtracted; both are given.
"""

import argparse
import statistics
import time
from typing import Any

import turns

BATCH_SIZE, SEQ_LEN, VOCAB_SIZE, THREADS = 4, 512, 32000, 2
PEAK_SIZE = 4096


def serve_transformers(precision: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    imports = turns.rss_bytes()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=768, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=2048, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN))

    def step() -> dict[str, Any]:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _answer(started, imports, float(loss))

    turns.serve(step)


def serve_ours(precision: str) -> None:
    import torch

    from entrenar.model import Llama, LlamaConfig
    from entrenar.ops.linear import fastest_compute_dtype
    from entrenar.train import OptimConfig, build_optimizer, keep_freed_memory

    torch.set_num_threads(THREADS)
    imports = turns.rss_bytes()
    keep_freed_memory()
    config = LlamaConfig.preset("124m")
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-4), precision)
    stored = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model.set_compute_dtype(fastest_compute_dtype(stored, torch.device("cpu")))
    input_ids = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN))
    targets = torch.cat([input_ids[:, 1:], torch.full((BATCH_SIZE, 1), -100)], dim=1)
    num_targets = int((targets >= 0).sum())

    def step() -> dict[str, Any]:
        started = time.perf_counter()
        optimizer.gradients.begin(1)
        loss = model.loss(input_ids, targets)
        loss.backward()
        norm = float(optimizer.gradient_norm()) / num_targets
        scale = min(1.0, 1.0 / (norm + 1e-6)) / num_targets
        optimizer.step(1e-4, scale)
        return _answer(started, imports, float(loss) / num_targets)

    turns.serve(step)


def serve_peak(precision: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    products = {dtype: torch.randn(PEAK_SIZE, PEAK_SIZE).to(getattr(torch, dtype)) for dtype in {precision, "float32"}}

    def measure() -> dict[str, Any]:
        flops_per_s = {}
        for dtype, matrix in products.items():
            started = time.perf_counter()
            matrix @ matrix
            flops_per_s[dtype] = 2 * PEAK_SIZE**3 / (time.perf_counter() - started)
        return flops_per_s

    turns.serve(measure)


def _answer(started: float, imports: int, loss: float) -> dict[str, Any]:
    elapsed_s = time.perf_counter() - started
    return {"elapsed_s": elapsed_s, "loss": loss, "peak_bytes": turns.peak_rss_bytes(), "imports_bytes": imports}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--worker")
    parsed = arguments.parse_args()
    serving = {"transformers": serve_transformers, "ours": serve_ours, "peak": serve_peak}
    if parsed.worker:
        serving[parsed.worker](parsed.precision)
        return
    workers = [
        turns.Worker(name, [__file__, "--worker", name, "--precision", parsed.precision])
        for name in ("ours", "transformers", "peak")
    ]
    answers = turns.in_turns(workers, parsed.rounds, warmup=2)
    print(turns.write_result(f"train_step_{parsed.precision}", _summary(answers, parsed.precision)).read_text())


def _summary(answers: dict[str, list[dict[str, Any]]], precision: str) -> dict[str, Any]:
    from entrenar.model import LlamaConfig

    tokens = BATCH_SIZE * SEQ_LEN
    flops = LlamaConfig.preset("124m").flops_per_token(SEQ_LEN) * tokens
    elapsed = {name: [answer["elapsed_s"] for answer in answers[name]] for name in ("ours", "transformers")}
    peaks = {dtype: [answer[dtype] for answer in answers["peak"]] for dtype in answers["peak"][0]}
    last = {name: answers[name][-1] for name in elapsed}
    added = {name: last[name]["peak_bytes"] - last[name]["imports_bytes"] for name in last}
    return {
        **turns.machine(),
        "workload": f"124m preset, batch {BATCH_SIZE} x {SEQ_LEN}, {precision}, {THREADS} threads",
        "tokens_per_s": {name: round(tokens / statistics.median(times), 1) for name, times in elapsed.items()},
        "speed_over_transformers": round(turns.median_ratio(elapsed["transformers"], elapsed["ours"]), 3),
        "matmul_peak_gflops": {dtype: round(statistics.median(values) / 1e9, 1) for dtype, values in peaks.items()},
        "share_of_peak": {
            name: {
                dtype: round(statistics.median(flops / t / p for t, p in zip(times, values, strict=True)), 3)
                for dtype, values in peaks.items()
            }
            for name, times in elapsed.items()
        },
        "added_peak_bytes": added,
        "peak_bytes": {name: last[name]["peak_bytes"] for name in last},
        "added_peak_over_transformers": round(added["ours"] / added["transformers"], 3),
        "peak_over_transformers": round(last["ours"]["peak_bytes"] / last["transformers"]["peak_bytes"], 3),
        "raw": answers,
    }


if __name__ == "__main__":
    main()

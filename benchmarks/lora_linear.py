"""Time and kept memory of an adapted projection, forward and backward, against PEFT's layer and plain torch.

    python benchmarks/lora_linear.py [--threads 2] [--rounds 15] [--rank 8]

2,048 tokens, the 124m preset's square (768 → 768) and widest (768 → 2560) projection, a frozen weight, an input that
needs a gradient, with and without dropout. The alternatives run in turns in one process; a ratio is the median over
the rounds of the ratio within a round, so that a busy machine weighs on both. Kept memory is what autograd holds
between forward and backward beyond weights and input.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from turns import machine, median_ratio, write_result

from entrenar import ops
from entrenar.ops.lora_linear import reference_lora_linear
from peft import LoraConfig as PeftConfig

TOKENS = 2048
SHAPES = {"q_proj 768 -> 768": (768, 768), "up_proj 768 -> 2560": (768, 2560)}
SCALE = 2.0

Forward = Callable[[Tensor], Tensor]


def peft_layer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout: float) -> PeftLinear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    rank = lora_a.shape[0]
    config = PeftConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=dropout)
    layer = PeftLinear(base, "default", config=config, r=rank, lora_alpha=int(SCALE * rank))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora_a)
        layer.lora_B["default"].weight.copy_(lora_b)
    return layer.to(weight.dtype).train()


def alternatives(
    dtype: torch.dtype, shape: tuple[int, int], rank: int, dropout: float
) -> tuple[Tensor, dict[str, Forward]]:
    inputs, outputs = shape
    x = torch.randn(4, TOKENS // 4, inputs).to(dtype).requires_grad_()
    weight = torch.randn(outputs, inputs).div_(inputs**0.5).to(dtype)
    lora_a = torch.randn(rank, inputs).div_(inputs**0.5).to(dtype).requires_grad_()
    lora_b = torch.randn(outputs, rank).mul_(0.1).to(dtype).requires_grad_()
    peft = peft_layer(weight, lora_a, lora_b, dropout)
    rows: dict[str, Forward] = {
        "ours": lambda x: ops.lora_linear(x, weight, lora_a, lora_b, scale=SCALE, dropout=dropout),
        "peft": peft,
        "plain torch": lambda x: reference_lora_linear(x, weight, lora_a, lora_b, scale=SCALE, dropout=dropout),
        "frozen nn.Linear": lambda x: nn.functional.linear(x, weight),
    }
    if dtype == torch.bfloat16:
        rows["ours, multiplied in float32"] = lambda x: ops.lora_linear(
            x, weight, lora_a, lora_b, scale=SCALE, dropout=dropout, compute_dtype=torch.float32
        )
    if dropout == 0:
        expected = rows["ours"](x).detach().double()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        for name in ("peft", "plain torch"):
            assert float((rows[name](x).detach().double() - expected).abs().max()) < tolerance * float(
                expected.abs().max()
            )
    return x, rows


def kept_bytes(forward: Forward, x: Tensor) -> int:
    """Return what autograd keeps beyond the input and everything as small as a weight's rank."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.shape[0] * tensor.ndim > 0 and tensor.numel() >= TOKENS:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(x)
    held.pop(x.untyped_storage().data_ptr(), None)
    del output
    return sum(held.values())


def measure(dtype: torch.dtype, shape: tuple[int, int], rank: int, dropout: float, rounds: int) -> dict[str, Any]:
    x, rows = alternatives(dtype, shape, rank, dropout)
    cotangent = torch.randn(*x.shape[:-1], shape[1]).to(dtype)
    elapsed_s: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 2):
        for name, forward in rows.items():
            x.grad = None
            started = time.perf_counter()
            forward(x).backward(cotangent)
            if number >= 2:
                elapsed_s[name].append(time.perf_counter() - started)
    weight_bytes = shape[0] * shape[1] * dtype.itemsize
    return {
        name: {
            "median_ms": 1000 * statistics.median(times),
            "times_ours": median_ratio(times, elapsed_s["ours"]),
            "kept_mib": max(0, kept_bytes(rows[name], x) - weight_bytes) / 2**20,
        }
        for name, times in elapsed_s.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--rank", type=int, default=8)
    parsed = arguments.parse_args()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for label, shape in SHAPES.items():
            for dropout in (0.0, 0.1):
                key = f"{label}, {str(dtype).removeprefix('torch.')}, dropout {dropout}"
                results[key] = measure(dtype, shape, parsed.rank, dropout, parsed.rounds)
                print(key)
                for name, row in results[key].items():
                    print(
                        f"  {name:<30} {row['median_ms']:8.2f} ms   {row['times_ours']:5.2f} x ours   "
                        f"keeps {row['kept_mib']:6.2f} MiB"
                    )
    settings = {"tokens": TOKENS, "rank": parsed.rank, "rounds": parsed.rounds}
    print(write_result("lora_linear", {"machine": machine(), "settings": settings, "results": results}))


if __name__ == "__main__":
    main()

"""Time and memory of every operation against torch's alternatives, at the shapes of the 124m preset.

    python benchmarks/ops.py [--threads 2] [--rounds 7] [--compile] [--out benchmarks/results/ops.json]

Batch 4 × 512 tokens, width 768, 12 heads of 64, hidden 2560, vocabulary 32000, float32 and bfloat16. The alternatives
of an operation run in turns, so that a disturbance of the machine falls on all of them. Time is the median of the
rounds. Memory is the most that torch's allocator held at once beyond what it held before, from the profiler's
allocation events.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar import ops
from entrenar.ops.attention import derived_attention
from entrenar.ops.rms_norm import reference_rms_norm
from entrenar.ops.rope import reference_rope
from entrenar.ops.swiglu import reference_swiglu

BATCH, TIME, WIDTH, HEADS, HIDDEN, VOCAB = 4, 512, 768, 12, 2560, 32000
EPS = 1e-5

Alternatives = dict[str, Callable[..., Tensor]]


def rms_norm_rows(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Alternatives]:
    inputs = (torch.randn(BATCH, TIME, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype))
    return inputs, {
        "ours": lambda x, w: ops.rms_norm(x, w, EPS),
        "F.rms_norm": lambda x, w: F.rms_norm(x, (WIDTH,), w, EPS),
        "plain torch": lambda x, w: reference_rms_norm(x, w, EPS),
    }


def rope_rows(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Alternatives]:
    angles = torch.randn(1, TIME, WIDTH // HEADS // 2)
    cos, sin = angles.cos(), angles.sin()
    full_cos, full_sin = (torch.cat((t, t), -1)[:, None].to(dtype) for t in (cos, sin))

    def in_its_dtype(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * full_cos + torch.cat((-second, first), -1) * full_sin

    inputs = (torch.randn(BATCH, TIME, HEADS, WIDTH // HEADS).to(dtype).transpose(1, 2),)
    return inputs, {
        "ours": lambda x: ops.rope(x, cos, sin),
        "plain torch, tables in x's dtype": in_its_dtype,
        "plain torch": lambda x: reference_rope(x, cos, sin),
    }


def swiglu_rows(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Alternatives]:
    inputs = tuple(torch.randn(BATCH, TIME, HIDDEN).to(dtype) for _ in range(2))
    return inputs, {
        "ours": ops.swiglu,
        "F.silu(gate) * up": lambda gate, up: F.silu(gate) * up,
        "plain torch": reference_swiglu,
    }


def attention_rows(dtype: torch.dtype, groups: int = HEADS) -> tuple[tuple[Tensor, ...], Alternatives]:
    head = WIDTH // HEADS
    inputs = tuple(torch.randn(BATCH, TIME, h, head).to(dtype).transpose(1, 2) for h in (HEADS, groups, groups))
    repeats = HEADS // groups
    rows = {
        "ours": ops.attention,
        "ours, products in float32": lambda q, k, v: ops.attention(q, k, v, compute_dtype=torch.float32),
        "sdpa, enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "sdpa, repeated heads": lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), is_causal=True
        ),
        "ours, derived backward": derived_attention,
    }
    return inputs, {name: row for name, row in rows.items() if dtype != torch.float32 or "float32" not in name}


def loss_rows(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Alternatives]:
    tokens = BATCH * TIME
    targets = torch.randint(0, VOCAB, (tokens,))
    inputs = (torch.randn(tokens, WIDTH).to(dtype), (torch.randn(VOCAB, WIDTH) / 30).to(dtype))

    accurate = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate", batch_chunk_size=256)  # its fastest on a CPU

    rows = {
        "ours": lambda x, w: ops.linear_cross_entropy(x, w, targets),
        "ours, products in float32": lambda x, w: ops.linear_cross_entropy(x, w, targets, compute_dtype=torch.float32),
        "F.linear_cross_entropy, accurate, 256": lambda x, w: F.linear_cross_entropy(
            x, w, targets, reduction="sum", options=accurate
        ),
        "F.cross_entropy of dense logits": lambda x, w: F.cross_entropy((x @ w.mT).float(), targets, reduction="sum"),
    }
    return inputs, {name: row for name, row in rows.items() if dtype != torch.float32 or "float32" not in name}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most that torch's allocator held at once during the run, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def runs_of(inputs: tuple[Tensor, ...], alternative: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.no_grad():
        dy = torch.ones_like(alternative(*inputs))

    def forward() -> None:
        with torch.no_grad():
            alternative(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(alternative(*leaves), leaves, dy)

    return {"forward": forward, "forward+backward": forward_backward}


def race(inputs: tuple[Tensor, ...], alternatives: Alternatives, rounds: int) -> list[dict[str, object]]:
    """Measure the alternatives in turns."""
    rows = []
    named = {name: runs_of(inputs, alternative) for name, alternative in alternatives.items()}
    for phase in ("forward", "forward+backward"):
        elapsed_s: dict[str, list[float]] = {name: [] for name in named}
        for name in named:
            named[name][phase]()  # the first call prepares kernels
        for _ in range(rounds):
            for name, runs in named.items():
                started = time.perf_counter()
                runs[phase]()
                elapsed_s[name].append(time.perf_counter() - started)
        rows += [
            {
                "alternative": name,
                "phase": phase,
                "median_ms": round(statistics.median(times) * 1e3, 3),
                "min_ms": round(min(times) * 1e3, 3),
                "peak_mib": round(peak_bytes(named[name][phase]) / 2**20, 2),
            }
            for name, times in elapsed_s.items()
        ]
    return rows


def measure(rounds: int, *, with_compile: bool) -> list[dict[str, object]]:
    """Measure every operation in both dtypes."""
    results = []
    builders = {
        "rms_norm": rms_norm_rows,
        "rope": rope_rows,
        "swiglu": swiglu_rows,
        "attention": attention_rows,
        "attention, 4 key heads": lambda dtype: attention_rows(dtype, 4),
        "linear_cross_entropy": loss_rows,
    }
    for op, build in builders.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs, alternatives = build(dtype)
            if with_compile and op in ("rms_norm", "rope", "swiglu"):
                alternatives["plain torch, torch.compile"] = torch.compile(alternatives["plain torch"])
            label = str(dtype).removeprefix("torch.")
            print(f"\n{op}, {label}")
            for row in race(inputs, alternatives, rounds if op != "linear_cross_entropy" else min(rounds, 3)):
                results.append({"op": op, "dtype": label, **row})
                print(
                    f"  {row['phase']:17} {row['alternative']:38} {row['median_ms']:9.2f} ms"
                    f"  (least {row['min_ms']:9.2f})  {row['peak_mib']:9.1f} MiB"
                )
    return results


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compile", action="store_true", help="also measure torch.compile of the elementwise references"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ops.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="torch")
    load_before = os.getloadavg()[0]
    results = measure(arguments.rounds, with_compile=arguments.compile)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "threads": arguments.threads,
        "load_average_before_and_after": [round(load, 1) for load in (load_before, os.getloadavg()[0])],
        "torch": torch.__version__,
        "shapes": {"batch": BATCH, "time": TIME, "width": WIDTH, "heads": HEADS, "hidden": HIDDEN, "vocab": VOCAB},
        "rounds": arguments.rounds,
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A token's time from a quantized model: weights as they are, or prepared; in turns, against the bytes to be read.

    python benchmarks/decode_quantized.py --preset 1b --json benchmarks/results/decode_quantized.json

Random weights, rounded to NF4 as `--method qlora` holds them. `exact` widens every weight for every token; `auto`
prepares each weight once (infer/prepared.py). The bound is the time in which this machine reads the bytes of a token's
weights: those of the prepared projections, and of the head in float32. It is measured by summing a large array.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from entrenar.infer import GenerateConfig, generate, prepared
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import quantize_nf4
from entrenar.peft import put_quantized

TOKENS = {"exact": 6, "auto": 24}


def make(preset: str, layers: int | None) -> Llama:
    """Return a model of random weights with its projections in NF4."""
    changes = {} if layers is None else {"num_layers": layers}
    config = LlamaConfig.preset(preset, **changes)
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        weight = torch.ones(parameter.shape)
        if weight.dim() > 1:
            weight.normal_(0, 0.02, generator=generator)
        if "_proj" in name:
            put_quantized(model, name.removesuffix(".weight"), quantize_nf4(weight), torch.float32)
        else:
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model.eval()


def read_bytes_per_s() -> float:
    """Return how fast this process reads memory: the best of ten sums of 1 GB."""
    large = torch.ones(1 << 28)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        large.sum()
        times.append(time.perf_counter() - started)
    return float(large.nbytes / min(times))


def write(model: Llama, rows: int, decode: Any) -> dict[str, Any]:
    """Write tokens; return the seconds of each and the text."""
    config = GenerateConfig(max_new_tokens=TOKENS[decode], temperature=0, eos_token_ids=(), decode=decode)
    prompts = [[1 + row, 5, 9, 33, 7, 2] for row in range(rows)]
    stamps, tokens = [], []
    started = time.perf_counter()
    for step in generate(model, prompts, config):
        stamps.append(time.perf_counter())
        tokens.append(step[0])
    between = [b - a for a, b in pairwise(stamps)]
    return {"token_s": statistics.median(between), "first_s": stamps[0] - started, "tokens": tokens}


def size_of(form: Any) -> int:
    """Return the bytes of a form's matrix."""
    return int((form.codes if isinstance(form, prepared.Int8Rows) else form.weight).nbytes)


def measure(model: Llama, rows: int, rounds: int) -> dict[str, Any]:
    """Compare the two ways for a number of rows."""
    first = write(model, rows, "auto")  # prepares
    found: dict[str, list[dict[str, Any]]] = {"exact": [], "auto": []}
    for _ in range(rounds):
        for decode, runs in found.items():
            runs.append(write(model, rows, decode))
    token_s = {decode: statistics.median(run["token_s"] for run in runs) for decode, runs in found.items()}
    shared = min(len(runs[0]["tokens"]) for runs in found.values())
    forms = prepared._KNOWN[model]
    head = model.head_weight
    projections = sum(size_of(form) for form in forms.of_modules.values())
    read = projections + (head.nbytes if isinstance(head, torch.Tensor) else size_of(forms.head))
    return {
        "rows": rows, "token_ms": {decode: round(1e3 * s, 2) for decode, s in token_s.items()},
        "speedup": round(token_s["exact"] / token_s["auto"], 2),
        "prepare_s": round(first["first_s"] - found["auto"][0]["first_s"], 2),
        "same_tokens": found["exact"][0]["tokens"][:shared] == found["auto"][0]["tokens"][:shared],
        "bytes_read": read,
        "raw_token_s": {decode: [run["token_s"] for run in runs] for decode, runs in found.items()},
    }  # fmt: skip


def main() -> None:
    """Measure one row and sixteen."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--preset", default="1b")
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--json", type=Path)
    parsed = arguments.parse_args()
    torch.set_num_threads(parsed.threads)
    bandwidth = read_bytes_per_s()
    model = make(parsed.preset, parsed.layers)
    cases = [measure(model, rows, parsed.rounds) for rows in (1, 16)]
    for case in cases:
        case["share_of_bandwidth"] = round(case["bytes_read"] / bandwidth / case["token_ms"]["auto"] * 1e3, 3)
        print(json.dumps({key: value for key, value in case.items() if key != "raw_token_s"}))
    result = {
        "date": datetime.now(UTC).date().isoformat(), "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__, "threads": parsed.threads, "preset": parsed.preset, "layers": parsed.layers,
        "parameters": model.config.parameter_count(), "read_gb_per_s": round(bandwidth / 1e9, 2), "cases": cases,
    }  # fmt: skip
    if parsed.json:
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Loading a folder of the 1b preset, ours against transformers, in turns in one run: time and peak memory.

    python benchmarks/load.py [--rounds 3] [--dtype bfloat16]

Random bfloat16 weights are written into a temporary folder. Each load is a process of its own; its peak is the
kernel's (VmHWM), given over what the process held after its imports. Both read from the page cache. Ours looks at
every weight (NaN, infinity); transformers maps the file and looks at none. Seconds of the CPU are given beside the
clock's, because other work on the machine moves only the clock's.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import turns

THREADS = 2


def make_model(folder: Path) -> None:
    import torch

    from entrenar.interop import save_model
    from entrenar.model import Llama, LlamaConfig

    config = LlamaConfig.preset("1b")
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    save_model(folder, config, weights)


def load_once(who: str, folder: Path, dtype_name: str) -> dict[str, Any]:
    code = Path(__file__)
    command = [sys.executable, str(code), "--load", who, "--folder", str(folder), "--dtype", dtype_name]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    elapsed_s, cpu_s, peak, before, size = map(float, answer.split()[-5:])
    return {"elapsed_s": elapsed_s, "cpu_s": cpu_s, "added_peak_bytes": peak - before, "model_bytes": size}


def load(who: str, folder: Path, dtype_name: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    dtype = getattr(torch, dtype_name)
    if who == "ours":
        from entrenar.interop import load_model

        def loading() -> Any:
            return load_model(folder, dtype=dtype)
    else:
        from transformers import LlamaForCausalLM

        def loading() -> Any:
            return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)

    before = turns.rss_bytes()
    started, cpu_started = time.perf_counter(), time.process_time()
    model = loading()
    # A memory map is read when it is used: both must have touched every page.
    total = sum(float(weight.detach().view(-1)[::512].sum()) for weight in model.parameters())
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    assert math.isfinite(total)
    size = sum(weight.nbytes for weight in model.parameters())
    print(elapsed_s, cpu_s, turns.peak_rss_bytes(), before, size)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments.add_argument("--load", choices=("ours", "transformers"))
    arguments.add_argument("--folder", type=Path)
    parsed = arguments.parse_args()
    if parsed.load:
        load(parsed.load, parsed.folder, parsed.dtype)
        return
    answers: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place))
        for number in range(parsed.rounds + 1):  # the first warms the page cache
            for who, found in answers.items():
                answer = load_once(who, Path(place), parsed.dtype)
                print(number, who, answer, file=sys.stderr, flush=True)
                if number:
                    found.append(answer)
    elapsed = {who: [answer["elapsed_s"] for answer in found] for who, found in answers.items()}
    peaks = {who: max(answer["added_peak_bytes"] for answer in found) for who, found in answers.items()}
    size = answers["ours"][0]["model_bytes"]
    result = {
        **turns.machine(),
        "workload": f"1b preset, file bfloat16, loaded as {parsed.dtype}, {THREADS} threads",
        "elapsed_s": {who: round(statistics.median(times), 3) for who, times in elapsed.items()},
        "cpu_s": {
            who: round(statistics.median(answer["cpu_s"] for answer in found), 3) for who, found in answers.items()
        },
        "speed_over_transformers": round(turns.median_ratio(elapsed["transformers"], elapsed["ours"]), 2),
        "model_bytes": size,
        "added_peak_over_model": {who: round(peak / size, 3) for who, peak in peaks.items()},
        "raw": answers,
    }
    print(turns.write_result(f"load_{parsed.dtype}", result).read_text())


if __name__ == "__main__":
    main()

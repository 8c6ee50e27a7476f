"""Hold the planner against the kernel's peak: for every cell one fresh process plans, and another takes the steps.

    python benchmarks/plan.py                       the grid on the tiny and 124m presets
    python benchmarks/plan.py --cells lora          those whose name holds a word
    python benchmarks/plan.py --folder DIR --method qlora      one cell on a model folder, such as a 7b one

The figure is VmHWM at the end minus VmRSS after the imports, against `Plan.added_bytes`. Products are in float32, or
what is faster would be measured anew in each process. Finished cells are kept in results/plan.json and are not run
again unless --again is given. With `keep` two runs of one cell differ, so such cells hold several of both.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from turns import RESULTS, machine, peak_rss_bytes, write_result

STEPS = 2
TIMES_KEPT = 3
METHODS = ("pretrain", "full", "lora", "qlora")


def cells() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield name and flags of every cell: sequence, batch, rank, checkpointing, method, precision, freed memory."""
    for preset, shapes in {"tiny": ((4, 256), (16, 64)), "124m": ((1, 512), (2, 256))}.items():
        first = {"preset": preset, "rank": "8", "batch_size": str(shapes[0][0]), "seq_len": str(shapes[0][1])}
        first |= {"checkpointing": "none", "freed_memory": "return", "precision": "bfloat16"}
        second = {"batch_size": str(shapes[1][0]), "seq_len": str(shapes[1][1])}
        for method in METHODS:
            cell = first | {"method": method}
            changes = [{}, second, {"precision": "float32"}, {"checkpointing": "selective"}, {"checkpointing": "full"}]
            changes += [{"rank": "64"}] if method in ("lora", "qlora") else []
            changes += [{"freed_memory": "keep"}] if method in ("pretrain", "lora") else []
            for change in changes:
                yield name_of(flags := cell | change), flags


def name_of(flags: dict[str, str]) -> str:
    """Return what a cell is called."""
    shape = f"{flags['batch_size']}x{flags['seq_len']}"
    parts = (flags["method"], flags["precision"], shape, flags["checkpointing"], flags["rank"], flags["freed_memory"])
    return "-".join((flags["preset"], *parts))


def config_of(flags: dict[str, str], folder: Path | None) -> Any:
    """Return the config that a cell's flags mean."""
    from entrenar.config_file import load_config, load_finetune_config

    train = {
        "compute_dtype": flags.get("compute_dtype", "float32"),
        "train.precision": flags["precision"],
        "train.checkpointing": flags["checkpointing"],
        "train.freed_memory": flags["freed_memory"],
        "train.stream_base": flags.get("stream_base", "false"),
        "train.max_steps": str(STEPS),
    }
    if flags["method"] == "pretrain":
        data = {"data.batch_size": flags["batch_size"], "data.seq_len": flags["seq_len"]}
        return load_config(None, {"preset": flags["preset"], **train, **data})
    sft = {"sft.data": "rows.jsonl", "sft.batch_size": flags["batch_size"], "sft.seq_len": flags["seq_len"]}
    lora = {} if flags["method"] == "full" else {"lora.rank": flags["rank"]}
    return load_finetune_config(None, {"model": str(folder), "method": flags["method"], **train, **sft, **lora})


def predict(flags: dict[str, str], folder: Path | None) -> dict[str, Any]:
    """Plan a cell: the body of a fresh process."""
    from entrenar.planning import plan_run

    started = time.process_time()
    planned = plan_run(config_of(flags, folder), folder).step
    return {
        "planned_bytes": planned.added_bytes, "tensors": dict(planned.tensors),
        "allocator_bytes": planned.allocator_bytes, "kernels_bytes": planned.kernels_bytes,
        "plan_cpu_s": time.process_time() - started, "planned_step_s": planned.step_s,
    }  # fmt: skip


def take(flags: dict[str, str], folder: Path | None) -> dict[str, Any]:
    """Take a cell's steps in earnest: the body of another."""
    from entrenar.planning import Ledger, status_bytes, take_step
    from entrenar.planning.run_plan import batches_of, full_rows, scene_of
    from entrenar.train import build_optimizer, prepare_process

    imports_bytes = status_bytes("VmRSS")
    config = config_of(flags, folder)
    prepare_process(config.train)
    model = real_model(config, folder)
    batches = batches_of(config)
    rows, length = batches.batch_size, min(batches.seq_len, model.config.context_length)
    batch = full_rows(rows, length, model.config.vocab_size, has_documents=batches.packs_documents)
    scene = scene_of(config, model, [batch], [])
    if config.train.stream_base:
        model.stream_base()
    optimizer = build_optimizer(model.named_parameters(), scene.optim, scene.precision)
    steps_s = []
    for _ in range(STEPS):
        started = time.perf_counter()
        take_step(scene, optimizer, Ledger())
        steps_s.append(time.perf_counter() - started)
    measured = peak_rss_bytes() - imports_bytes
    return {"measured_bytes": measured, "imports_bytes": imports_bytes, "step_s": min(steps_s)}


def measure(flags: dict[str, str], folder: Path | None) -> dict[str, Any]:
    """Return a cell's figures; the median of several where runs differ, with all of them."""
    times = TIMES_KEPT if flags["freed_memory"] == "keep" else 1
    runs = [_in_fresh_process("take", flags, folder) for _ in range(times)]
    plans = [_in_fresh_process("predict", flags, folder) for _ in range(times)]
    runs.sort(key=lambda run: run["measured_bytes"])
    plans.sort(key=lambda plan: plan["planned_bytes"])
    cell = plans[times // 2] | runs[times // 2]
    cell["ratio"] = cell["planned_bytes"] / cell["measured_bytes"]
    if times > 1:
        cell["all_planned_bytes"] = [plan["planned_bytes"] for plan in plans]
        cell["all_measured_bytes"] = [run["measured_bytes"] for run in runs]
    return cell


def _in_fresh_process(part: str, flags: dict[str, str], folder: Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, "--flags", json.dumps(flags)]
    command += [] if folder is None else ["--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} of {flags} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def real_model(config: Any, folder: Path | None) -> Any:
    """Return the model as the recipes build or load it."""
    from entrenar.interop import load_model
    from entrenar.interop.assemble import give_storage
    from entrenar.model import Llama
    from entrenar.peft import from_base

    if folder is None:
        with torch.device("meta"):
            model = Llama(config.model)
        give_storage(model, torch.device("cpu"))
        model.init_weights(torch.Generator().manual_seed(0))
        return model
    model = load_model(folder, dtype=config.stored_dtype, quantize=config.method == "qlora")
    if config.method != "full":
        from_base(model, config.lora, torch.Generator().manual_seed(0))
    return model


def write_folder(preset: str, folder: Path) -> None:
    """Write a preset with random weights as a bfloat16 folder."""
    from entrenar.interop import save_model
    from entrenar.model import Llama, LlamaConfig

    model = Llama(LlamaConfig.preset(preset))
    model.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    save_model(folder, model.config, model.to(torch.bfloat16).state_dict())


def main() -> int:
    """Run the cells that are missing, one after the other, and keep each as soon as it is done."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cells", default="")
    arguments.add_argument("--again", action="store_true")
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--method", default="qlora")
    arguments.add_argument("--part", choices=("predict", "take", "measure"), help=argparse.SUPPRESS)
    arguments.add_argument("--flags", type=json.loads, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.part is not None:
        parts = {"predict": predict, "take": take, "measure": measure}
        print(json.dumps(parts[given.part](given.flags, given.folder)))
        return 0
    path = RESULTS / "plan.json"
    result = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    chosen = [cell for cell in cells() if given.cells in cell[0]]
    if given.folder is not None:
        flags = {"method": given.method, "batch_size": "1", "seq_len": "512", "checkpointing": "full", "rank": "8"}
        flags |= {"precision": "bfloat16", "freed_memory": "return"}
        chosen = [(name_of(flags | {"preset": given.folder.name}), flags)]
    with tempfile.TemporaryDirectory() as temporary:
        for name, flags in chosen:
            if name in result["cells"] and not given.again:
                continue
            folder = given.folder or Path(temporary) / flags["preset"]
            if not folder.exists() and flags["method"] != "pretrain":
                write_folder(flags["preset"], folder)
            cell = measure(flags, None if flags["method"] == "pretrain" else folder)
            print(f"{name:<44} {cell['planned_bytes'] / 1e6:8.0f} MB planned  {cell['measured_bytes'] / 1e6:8.0f} "
                  f"measured  {cell['ratio']:.3f}   plan {cell['plan_cpu_s']:.1f} s", flush=True)  # fmt: skip
            result["cells"][name] = cell
            write_result("plan", {**machine(), "cells": result["cells"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

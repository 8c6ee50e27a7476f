"""Hold the planner against the kernel's peak: every cell a fresh process that plans, then takes the steps in earnest.

    python benchmarks/plan.py                       the grid on the tiny and 124m presets
    python benchmarks/plan.py --cells lora          those whose name holds a word
    python benchmarks/plan.py --folder DIR --method qlora      one cell on a model folder, such as a 7b one

The figure is VmHWM at the end minus VmRSS after the imports, against `Plan.added_bytes`. Finished cells are kept in
results/plan.json and are not run again unless --again is given.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from turns import RESULTS, machine, peak_rss_bytes, write_result

STEPS = 3
METHODS = ("pretrain", "full", "lora", "qlora")


def cells() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield name and flags of every cell: sequence, batch, rank, checkpointing, method, precision, freed memory."""
    shapes_of = {"tiny": ((1, 256), (4, 256), (16, 64)), "124m": ((1, 512), (2, 512), (1, 1024))}
    for preset, shapes in shapes_of.items():
        for (rows, length), precision, method in product(shapes, ("bfloat16", "float32"), METHODS):
            is_middle = (rows, length) == shapes[1]
            for checkpointing in ("none", "selective", "full") if is_middle else ("none",):
                for rank in ("8", "64") if is_middle and method == "lora" and checkpointing == "none" else ("8",):
                    for freed in ("return", "keep"):
                        flags = {"preset": preset, "method": method, "precision": precision, "rank": rank}
                        flags |= {"batch_size": str(rows), "seq_len": str(length)}
                        flags |= {"checkpointing": checkpointing, "freed_memory": freed}
                        yield (
                            "-".join((preset, method, precision, f"{rows}x{length}", checkpointing, rank, freed)),
                            flags,
                        )


def config_of(flags: dict[str, str], folder: Path | None) -> Any:
    """Return the config that a cell's flags mean."""
    from entrenar.config import load_config, load_finetune_config

    train = {
        "train.precision": flags["precision"],
        "train.checkpointing": flags["checkpointing"],
        "train.freed_memory": flags["freed_memory"],
        "train.max_steps": str(STEPS),
    }
    if flags["method"] == "pretrain":
        data = {"data.batch_size": flags["batch_size"], "data.seq_len": flags["seq_len"]}
        return load_config(None, {"preset": flags["preset"], **train, **data})
    sft = {"sft.data": "rows.jsonl", "sft.batch_size": flags["batch_size"], "sft.seq_len": flags["seq_len"]}
    lora = {} if flags["method"] == "full" else {"lora.rank": flags["rank"]}
    return load_finetune_config(None, {"model": str(folder), "method": flags["method"], **train, **sft, **lora})


def work(flags: dict[str, str], folder: Path | None) -> dict[str, Any]:
    """Plan, then do it: the body of a fresh process."""
    from entrenar.recipe import plan as planning
    from entrenar.recipe.run import settle_compute_dtype
    from entrenar.scale import Ledger, go_through
    from entrenar.train import build_optimizer

    config = settle_compute_dtype(config_of(flags, folder), torch.device("cpu"), None)
    started = time.perf_counter()
    planned = planning.plan_run(config).step
    plan_s = time.perf_counter() - started
    model = real_model(config, folder)
    rows, length = planning.batch_shape(config, model.config)
    batch = planning.full_rows(rows, length, model.config.vocab_size, has_documents=planning.has_documents_in(config))
    scene = planning.scene_of(config, model, [batch], [])
    optimizer = build_optimizer(model.named_parameters(), scene.optim, scene.precision)
    steps_s = []
    for _ in range(STEPS):
        started = time.perf_counter()
        go_through(scene, optimizer, Ledger())
        steps_s.append(time.perf_counter() - started)
    measured = peak_rss_bytes() - planned.imports_bytes
    return {
        "planned_bytes": planned.added_bytes, "measured_bytes": measured, "ratio": planned.added_bytes / measured,
        "tensors": dict(planned.tensors), "allocator_bytes": planned.allocator_bytes,
        "kernels_bytes": planned.kernels_bytes, "imports_bytes": planned.imports_bytes,
        "plan_s": plan_s, "planned_step_s": planned.step_s, "step_s": min(steps_s),
    }  # fmt: skip


def real_model(config: Any, folder: Path | None) -> Any:
    """Return the model as the recipes build or load it."""
    from entrenar.interop import load_model
    from entrenar.model import Llama
    from entrenar.peft import from_base
    from entrenar.recipe.models import give_storage
    from entrenar.recipe.plan import storage_dtype

    if folder is None:
        with torch.device("meta"):
            model = Llama(config.model)
        give_storage(model, torch.device("cpu"))
        model.init_weights(torch.Generator().manual_seed(0))
        return model
    model = load_model(folder, dtype=storage_dtype(config), quantize=config.method == "qlora")
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
    arguments.add_argument("--flags", type=json.loads, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.flags is not None:
        print(json.dumps(work(given.flags, given.folder)))
        return 0
    path = RESULTS / "plan.json"
    result = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    chosen = [cell for cell in cells() if given.cells in cell[0]]
    if given.folder is not None:
        flags = {"method": given.method, "batch_size": "1", "seq_len": "512", "checkpointing": "full", "rank": "8"}
        flags |= {"precision": "bfloat16", "freed_memory": "return"}
        chosen = [(f"{given.folder.name}-{given.method}-1x512", flags)]
    with tempfile.TemporaryDirectory() as temporary:
        for name, flags in chosen:
            if name in result["cells"] and not given.again:
                continue
            folder = given.folder or Path(temporary) / flags["preset"]
            if not folder.exists() and flags["method"] != "pretrain":
                write_folder(flags["preset"], folder)
            command = [sys.executable, __file__, "--flags", json.dumps(flags)]
            command += [] if flags["method"] == "pretrain" else ["--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name:<44} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            cell = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:<44} {cell['planned_bytes'] / 1e6:8.0f} MB planned  {cell['measured_bytes'] / 1e6:8.0f} "
                  f"measured  {cell['ratio']:.3f}   plan {cell['plan_s']:.1f} s", flush=True)  # fmt: skip
            result["cells"][name] = cell
            write_result("plan", {**machine(), "cells": result["cells"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure what training takes: a fresh process for each cell, the kernel's own peak, what the imports took subtracted.

    python benchmarks/memory.py                      the matrix and the levers on 124m and 1b: about 12 minutes
    python benchmarks/memory.py --cells 124m,lever   those whose name holds one of the words
    python benchmarks/memory.py --cells 7b           one step of QLoRA on a 7b; makes its 3.9 GB folder first
    python benchmarks/memory.py --extra budget=DIR   also QLoRA over a folder of one's own

A cell takes steps on 1 x 512 tokens with adapters of rank 16 on q and v, over a folder of random weights
(`make_llama.py`) that is made when it is needed. Figures: `added_peak_bytes` is VmHWM at the end minus VmRSS after the
imports; the most that was resident is told apart into anonymous pages and those of files, such as a mapped base
(sampled every 20 ms); `base_bytes` is what the weights take as they are held. Finished cells are kept in
results/memory.json and not run again without --again, so an interrupted run goes on. A cell that this machine has no
memory for is recorded with the least that it needs: its weights, gradients and moments.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import turns

STEPS, RANK = 3, 16
CHART = Path(__file__).resolve().parents[1] / "docs" / "memory.png"
STATUS = Path("/proc/self/status")
COLORS = {"full": "#7f8c8d", "lora": "#9db4d0", "qlora": "#b03a2e"}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    preset: str
    method: str
    precision: str
    optimizer: str = "adamw"
    checkpointing: str = "full"
    offload: str = "none"
    freed_memory: str = "return"
    stream_base: bool = False
    seq_len: int = 512
    steps: int = STEPS
    folder: str = ""
    embedding: str = "keep"

    @property
    def layout(self) -> str:
        """The layout of the folder it is trained from: `make_llama.py --to`."""
        return "bits" if self.embedding == "bits" else "nf4" if self.method == "qlora" else "bf16"


def cells() -> Iterator[tuple[str, Cell]]:
    """Yield name and settings of each cell."""
    for preset, steps in (("124m", STEPS), ("1b", 2)):
        for method in ("full", "lora", "qlora"):
            for precision in ("float32", "bfloat16"):
                yield f"matrix {preset} {method} {precision}", Cell(preset, method, precision, steps=steps)
        full = Cell(preset, "full", "bfloat16", optimizer="adamw8bit", steps=steps)
        yield f"matrix {preset} full8bit bfloat16", full
        streamed = Cell(preset, "qlora", "bfloat16", stream_base=True, steps=steps)
        yield f"matrix {preset} qlora-streamed bfloat16", streamed
        for embedding in ("int8", "nf4", "bits"):
            name = "budget" if embedding == "bits" else f"qlora-embedding-{embedding}"
            for is_streamed in (False, True):
                yield (
                    f"matrix {preset} {name}{'-streamed' if is_streamed else ''} bfloat16",
                    replace(streamed, embedding=embedding, stream_base=is_streamed),
                )
    plain = Cell("124m", "qlora", "bfloat16", checkpointing="none", freed_memory="keep")
    yield "lever 124m nothing", plain
    yield "lever 124m freed_memory=return", replace(plain, freed_memory="return")
    for checkpointing in ("selective", "full"):
        yield (
            f"lever 124m checkpointing={checkpointing}",
            replace(plain, freed_memory="return", checkpointing=checkpointing),
        )
    yield "lever 124m offload=disk", replace(plain, freed_memory="return", offload="disk")
    everything = replace(plain, freed_memory="return", checkpointing="full", offload="disk", stream_base=True)
    yield "lever 124m full+disk+stream", everything
    yield "lever 124m long nothing", replace(plain, freed_memory="return", seq_len=2048, steps=1)
    yield "lever 124m long offload=disk", replace(everything, checkpointing="none", seq_len=2048, steps=1)
    yield "lever 124m long full+disk", replace(everything, seq_len=2048, steps=1)
    yield "matrix 7b lora float32", Cell("7b", "lora", "float32", steps=1)
    yield "matrix 7b qlora bfloat16", Cell("7b", "qlora", "bfloat16", steps=1)
    yield "matrix 7b qlora-streamed bfloat16", Cell("7b", "qlora", "bfloat16", steps=1, stream_base=True)


def needed_bytes(cell: Cell, parameters: int) -> int:
    """Return what weights, gradients and moments take, and nothing else."""
    if cell.method == "full":
        state = 2 if cell.optimizer == "adamw8bit" else 8
        return parameters * ((8 if cell.precision == "float32" else 6) + state)
    if cell.method == "lora":
        return parameters * (4 if cell.precision == "float32" else 2)
    return 0  # mapped: it fits anywhere


class Sampler:
    """Watches how much of the resident memory is anonymous and how much belongs to files."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_done.wait(0.02):
            for kind, size in status_bytes(*self.most).items():
                self.most[kind] = max(self.most[kind], size)

    def stop(self) -> dict[str, int]:
        """Return the most of each kind."""
        self._is_done.set()
        self._thread.join()
        return self.most


def status_bytes(*names: str) -> dict[str, int]:
    """Return lines of this process's /proc status in bytes."""
    lines = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0][:-1] in names}


def work(cell: Cell) -> dict[str, Any]:
    """Take the steps of a cell in this process and return its figures."""
    import torch

    from entrenar.interop import load_model
    from entrenar.ops import fastest_compute_dtype
    from entrenar.peft import LoraConfig, from_base
    from entrenar.train import OptimConfig, TrainConfig, build_optimizer, keep_freed_memory, return_freed_blocks
    from entrenar.train.offload import open_store

    imports = status_bytes("VmRSS", "RssAnon", "RssFile")
    (keep_freed_memory if cell.freed_memory == "keep" else return_freed_blocks)()
    sampler = Sampler()
    dtype = getattr(torch, cell.precision)
    compute_dtype = fastest_compute_dtype(dtype, torch.device("cpu"))
    # As the product does: what learns begins at what is in the file, what is frozen is held as it is computed with.
    model = load_model(Path(cell.folder), dtype=torch.float32 if cell.method == "full" else dtype)
    model.set_compute_dtype(compute_dtype)
    if cell.method != "full":
        from_base(model, LoraConfig(rank=RANK, lora_alpha=2 * RANK), torch.Generator().manual_seed(0))
    model.train()
    model.checkpointing = cell.checkpointing  # type: ignore[assignment]
    optimizer = build_optimizer(
        model.named_parameters(), OptimConfig(optimizer=cell.optimizer), precision=cell.precision
    )
    if cell.stream_base:
        model.stream_base()
    train = TrainConfig(max_steps=cell.steps, offload=cell.offload)
    store = open_store(model, train, Path(cell.folder).parent)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, cell.seq_len + 1), generator=generator)

    def loss_of(_: object) -> Any:
        return model.loss(ids[:, :-1], ids[:, 1:])

    loss = loss_of if store is None else store.around(loss_of)
    steps_s, losses = [], []
    for _ in range(cell.steps):
        started = time.perf_counter()
        optimizer.gradients.begin(1)
        total = loss(None)
        total.backward()
        norm = float(optimizer.gradient_norm()) / cell.seq_len
        optimizer.step(1e-4, min(1.0, 1.0 / norm) / cell.seq_len)
        losses.append(float(total.detach()) / cell.seq_len)
        steps_s.append(time.perf_counter() - started)
        del total
    most = sampler.stop()
    held = [*model.named_parameters(), *model.named_buffers()]
    return {
        "base_bytes": sum(t.nbytes for name, t in held if ".adapters." not in name),
        "imports_bytes": imports["VmRSS"],
        "peak_bytes": turns.peak_rss_bytes(),
        "added_peak_bytes": turns.peak_rss_bytes() - imports["VmRSS"],
        "most_added_anonymous_bytes": most["RssAnon"] - imports["RssAnon"],
        "most_added_file_bytes": most["RssFile"] - imports["RssFile"],
        "tokens_per_s": cell.seq_len / min(steps_s[1:] or steps_s),
        "steps_s": steps_s,
        "losses": losses,
        "compute_dtype": str(compute_dtype),
        "offloaded_bytes": 0 if store is None else store.most_bytes,
    }


def folder_of(cell: Cell, place: Path) -> Path:
    """Return the folder of a cell's model, made if it is not there."""
    is_plain = cell.embedding in ("keep", "bits")
    folder = place / "-".join((cell.preset, cell.layout, *(() if is_plain else (cell.embedding,))))
    if not (folder / "config.json").is_file():
        script = Path(__file__).with_name("make_llama.py")
        kind = [] if is_plain else ["--embedding", cell.embedding]
        subprocess.run([sys.executable, str(script), cell.preset, str(folder), "--to", cell.layout, *kind], check=True)
    return folder


def measure(cell: Cell, place: Path) -> dict[str, Any]:
    """Run one cell in a process of its own, if it fits."""
    from entrenar.model import LlamaConfig

    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable")
    )
    needed = needed_bytes(cell, LlamaConfig.preset(cell.preset).parameter_count())
    if needed * 1.1 > available:
        return {"cell": asdict(cell), "needs_at_least_bytes": needed, "available_bytes": available}
    cell = cell if cell.folder else replace(cell, folder=str(folder_of(cell, place)))
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(asdict(cell))], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"cell": asdict(cell), "failed": done.stderr.strip().splitlines()[-1:]}
    return {"cell": asdict(replace(cell, folder="")), **json.loads(done.stdout)}


def draw(results: dict[str, Any]) -> None:
    """Draw the matrix: added peak of each method, a panel for each model size."""
    import matplotlib.pyplot as plt

    presets = [p for p in ("124m", "1b", "7b") if any(f"matrix {p} " in name for name in results)]
    figure, panels = plt.subplots(1, len(presets), figsize=(4.2 * len(presets), 3.6), dpi=110, layout="constrained")
    for preset, axes in zip(presets, panels if len(presets) > 1 else [panels], strict=True):
        rows = [(n.split(" ", 2)[2], r) for n, r in results.items() if n.startswith(f"matrix {preset} ")]
        for place, (_, row) in enumerate(reversed(rows)):
            size = row.get("added_peak_bytes", row.get("needs_at_least_bytes", 0)) / 1e9
            is_measured = "added_peak_bytes" in row
            color = COLORS[row["cell"]["method"]]
            axes.barh(
                place, size, color=color if is_measured else "none", edgecolor=color, hatch="" if is_measured else "//"
            )
            axes.annotate(f" {size:.2f}" if is_measured else f" > {size:.1f}", (size, place), va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
        axes.set(xlabel="added peak, GB", title=preset)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    figure.savefig(CHART)


def in_order(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results in the order of the cells, those of other folders last."""
    names = [name for name, _ in cells() if name in results]
    return {name: results[name] for name in [*names, *(name for name in results if name not in names)]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cells", default="124m,1b", help="words, one of which a cell's name must hold")
    arguments.add_argument("--place", type=Path, default=Path("runs/memory"), help="where the model folders are made")
    arguments.add_argument(
        "--extra", action="append", default=[], metavar="NAME=DIR", help="also QLoRA over this folder"
    )
    arguments.add_argument("--again", action="store_true", help="also run cells that are there")
    arguments.add_argument("--clean", action="store_true", help="delete each model folder after its last cell")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    parsed = arguments.parse_args()
    if parsed.worker:
        print(json.dumps(work(Cell(**json.loads(parsed.worker)))))
        return
    path = turns.RESULTS / "memory.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}}
    wanted = {name: cell for name, cell in cells() if any(word in name for word in parsed.cells.split(","))}
    for extra in parsed.extra:
        name, folder = extra.split("=", 1)
        wanted[f"matrix extra qlora-{name}"] = Cell(name, "qlora", "bfloat16", folder=folder)
    for name, cell in wanted.items():
        if name not in report["cells"] or parsed.again:
            print(name, file=sys.stderr, flush=True)
            report["cells"][name] = measure(cell, parsed.place) | {
                "load_average": Path("/proc/loadavg").read_text()[:4]
            }
            turns.write_result("memory", {**turns.machine(), "cells": in_order(report["cells"])})
    draw(in_order(report["cells"]))
    if parsed.clean:
        shutil.rmtree(parsed.place, ignore_errors=True)


if __name__ == "__main__":
    main()

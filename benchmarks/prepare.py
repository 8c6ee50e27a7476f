"""What preparing text costs beside the bare `tokenizers` call, and whether memory grows with the corpus.

    python benchmarks/prepare.py [--rounds 5] [--threads 2] [--small-mb 10] [--large-mb 200]

Cost: `tokenizers` encodes the documents of the Python standard library in one `encode_batch` call, and `prepare` makes
a corpus of the same files (reading, hashing, splitting, writing, fsync), in turns in one process with as many threads.
The ratio is that of the medians, of wall time and of processor time (which other processes disturb less); the same is
said of `encode_batch_fast`, which leaves out offsets and is what `prepare` calls.

Memory: a fresh process per size prepares a generated text and reports its peak resident memory (VmHWM); another reads
4,000 batches of it. The text is of pseudo-random words with a fixed seed.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from entrenar.data import Corpus, Loader, PrepareConfig, Tokenizer, prepare
from entrenar.data.corpus.sources import ReadLog, find_sources, read_documents

RESULTS = Path(__file__).parent / "results" / "prepare.json"
SEPARATOR = "<|endoftext|>"


def write_text(path: Path, size_bytes: int) -> None:
    """Write documents of about 2 kB of words drawn by Zipf's law."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(rng.choice(letters, size=length)) for length in rng.integers(1, 10, 20000)])
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size_bytes:
            ranks = np.minimum(rng.zipf(1.2, size=36000), len(words)) - 1
            chosen = words[ranks]
            for start in range(0, len(chosen), 360):
                written += stream.write(" ".join(chosen[start : start + 360]) + f"\n{SEPARATOR}\n")


def peak_mb() -> float:
    """Return this process' peak resident memory; unlike ru_maxrss it starts anew at exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def prepare_child(source: str, out: str, tokenizer: str, threads: int) -> dict[str, float]:
    """Prepare in this process."""
    before = peak_mb()
    started = time.perf_counter()
    config = PrepareConfig(document_separator=SEPARATOR, threads=threads, val_fraction=0.01)
    manifest = prepare([source], out, config, tokenizer=tokenizer)
    train = manifest.splits["train"]
    elapsed_s = time.perf_counter() - started
    return {
        "documents": train.documents,
        "tokens": train.tokens,
        "imported_mb": round(before, 1),
        "peak_mb": round(peak_mb(), 1),
        "elapsed_s": round(elapsed_s, 2),
    }


def loader_child(corpus: str) -> dict[str, float]:
    """Read batches in this process."""
    before = peak_mb()
    loader = Loader(Corpus.open(corpus), batch_size=16, seq_len=512, seed=0)
    started = time.perf_counter()
    targets = sum(batch.num_targets for batch, _ in itertools.islice(loader, 4000))
    elapsed_s = time.perf_counter() - started
    return {
        "imported_mb": round(before, 1),
        "peak_mb": round(peak_mb(), 1),
        "ms_per_batch_of_16x512": round(elapsed_s / 4000 * 1e3, 3),
        "targets": targets,
    }


def in_child(*arguments: str) -> dict[str, Any]:
    """Run a `--child` of this script in a fresh process."""
    command = [sys.executable, __file__, "--child", *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout))


def timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return round(time.perf_counter() - wall, 3), round(time.process_time() - processor, 3)


def ratios(times: dict[str, list[tuple[float, float]]], kind: int) -> dict[str, float]:
    medians = {name: statistics.median(pair[kind] for pair in found) for name, found in times.items()}
    bare = ("encode_batch", "encode_batch_fast")
    return {f"prepare_over_{name}": round(medians["prepare"] / medians[name], 3) for name in bare}


def measure_cost(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time the bare calls and `prepare` in turns."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read at the pool's first use
    config = PrepareConfig(threads=threads, dedup=True)
    prepare(["stdlib"], folder / "stdlib", config)
    tokenizer = Tokenizer.load(folder / "stdlib")
    bare = tokenizers.Tokenizer.from_file(str(folder / "stdlib" / "tokenizer.json"))
    files = find_sources(["stdlib"], config)[0].files
    documents = [text for file in files for text in read_documents(file, config, ReadLog())]
    calls: dict[str, Callable[[], object]] = {
        "encode_batch": lambda: bare.encode_batch(documents, add_special_tokens=False),
        "encode_batch_fast": lambda: bare.encode_batch_fast(documents, add_special_tokens=False),
        "prepare": lambda: prepare(["stdlib"], folder / "again", config, tokenizer=tokenizer),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {
        "text": f"Python {platform.python_version()} standard library",
        "bytes": sum(len(text.encode()) for text in documents),
        "threads": threads,
        "wall_and_processor_seconds": times,
        "wall": ratios(times, 0),
        "processor": ratios(times, 1),
    }


def measure_memory(folder: Path, sizes_mb: list[int], threads: int) -> dict[str, Any]:
    """Prepare and read each size in fresh processes."""
    found: dict[str, Any] = {}
    for size_mb in sizes_mb:
        source, corpus = folder / "text.txt", folder / "corpus"
        write_text(source, size_mb << 20)
        prepared = in_child("prepare", str(source), str(corpus), str(folder / "stdlib"), str(threads))
        found[f"{size_mb}_mb"] = {"prepare": prepared, "loader": in_child("loader", str(corpus))}
    first, last = (found[f"{size_mb}_mb"] for size_mb in (sizes_mb[0], sizes_mb[-1]))
    for part in ("prepare", "loader"):
        found[f"{part}_growth_mb"] = round(last[part]["peak_mb"] - first[part]["peak_mb"], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small-mb", type=int, default=10)
    parser.add_argument("--large-mb", type=int, default=200)
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        kind, *rest = options.child
        result = loader_child(*rest) if kind == "loader" else prepare_child(rest[0], rest[1], rest[2], int(rest[3]))
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "date": time.strftime("%Y-%m-%d"),
            "load_average_at_start": round(os.getloadavg()[0], 2),
            "cost": measure_cost(folder, options.rounds, options.threads),
            "memory": measure_memory(folder, [options.small_mb, options.large_mb], options.threads),
        }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

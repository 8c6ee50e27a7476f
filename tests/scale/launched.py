"""Start the command as torchrun does: as processes that meet at a port, or by torchrun itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from entrenar import recipe
from entrenar.data import PrepareConfig, prepare, train_bpe
from entrenar.model import Llama, LlamaConfig

TIMEOUT_S = 300
VOCAB_SIZE = 300
WORDS = ("cat", "dog", "bird", "fish", "frog", "bear")
COMMAND = [sys.executable, "-m", "entrenar"]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(words: list[str], rank: int, size: int, port: int, *, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start one rank of the command."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [*COMMAND, *words], env=os.environ | {"OMP_NUM_THREADS": "1"} | (place if size > 1 else {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
    )  # fmt: skip


def on_ranks(*each: list[str]) -> list[tuple[int, str, str]]:
    """Run a command as ranks, one for each list of words; return exit code, output and errors of each."""
    port = free_port()
    ranks = [start(words, rank, len(each), port) for rank, words in enumerate(each)]
    ended = []
    for process in ranks:
        out, err = process.communicate(timeout=TIMEOUT_S)
        ended.append((process.returncode, out, err))
    return ended


def prepared_corpus(folder: Path) -> Path:
    """Prepare a small corpus with a tokenizer of its own."""
    words = np.random.default_rng(0).choice(["def", "return", "value", "self", "import", "for"], size=(400, 30))
    (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    options = PrepareConfig(vocab_size=VOCAB_SIZE, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", options)
    return folder / "corpus"


def train_words(corpus: Path, runs: Path, **flags: str) -> list[str]:
    """Return the words of a command that pre-trains two small layers."""
    given = {
        "name": "trial", "runs-dir": str(runs), "corpus": str(corpus), "batch-size": "6", "seq-len": "32",
        "vocab-size": str(VOCAB_SIZE), "hidden-size": "32", "num-layers": "2", "num-heads": "4", "num-kv-heads": "2",
        "intermediate-size": "64", "max-seq-len": "64", "max-steps": "6", "lr": "0.01", "eval-every": "0",
        "threads": "1", "grad-accum-steps": "2", "save-every": "2", "device": "cpu", "compute-dtype": "float32",
        "log-every": "1",
    } | {key.replace("_", "-"): value for key, value in flags.items()}  # fmt: skip
    return ["train", *(part for key, value in given.items() for part in (f"--{key}", value))]


def base_model(folder: Path) -> Path:
    """Write a model of two small layers with a tokenizer of its own."""
    tokenizer = train_bpe([f"the opposite of {a} is {b}. " for a in WORDS for b in WORDS] * 2, 320)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(folder / "model", model, dict(model.named_parameters()), tokenizer)
    rows = [{"prompt": f"say {w} {'so ' * (n % 7)}{n}:", "completion": f" {w}"} for n in range(10) for w in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model"


def finetune_words(model: Path, runs: Path, **flags: str) -> list[str]:
    """Return the words of a command that fine-tunes for six steps."""
    given = {
        "model": str(model), "data": str(model.parent / "rows.jsonl"), "name": "trial", "runs-dir": str(runs),
        "batch-size": "3", "eval-fraction": "0.1", "max-steps": "6", "lr": "0.01", "eval-every": "0", "threads": "1",
        "grad-accum-steps": "2", "save-every": "0", "sample-answers": "0", "compute-dtype": "float32",
        "device": "cpu", "log-every": "1",
    } | {key.replace("_", "-"): value for key, value in flags.items()}  # fmt: skip
    return ["finetune", *(part for key, value in given.items() for part in (f"--{key}", value))]

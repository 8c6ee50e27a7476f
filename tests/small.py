"""A corpus and a model so small that a run of them takes a second."""

import json
from pathlib import Path

import numpy as np

from entrenar.data import PrepareConfig, prepare

VOCAB_SIZE = 300


def small_corpus(folder: Path) -> Path:
    """Prepare some words, with a tokenizer of their own; return the corpus."""
    words = np.random.default_rng(0).choice(["def", "return", "value", "self", "for", "in", "0"], size=(200, 30))
    text = folder / "text.txt"
    text.write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    options = PrepareConfig(vocab_size=VOCAB_SIZE, val_fraction=0.1, document_separator="----", threads=1)
    prepare([text], folder / "corpus", options)
    return folder / "corpus"


def small_run(corpus: Path, runs: Path, **changes: str) -> dict[str, str]:
    """Return the options of a run named "first"; a change's `__` is the dot of its key."""
    base = {
        "name": "first", "runs_dir": str(runs), "data.corpus": json.dumps([str(corpus)]), "data.batch_size": "4",
        "data.seq_len": "32", "model.vocab_size": str(VOCAB_SIZE), "model.hidden_size": "32", "model.num_layers": "2",
        "model.num_heads": "4", "model.num_kv_heads": "2", "model.intermediate_size": "64", "model.max_seq_len": "64",
        "train.max_steps": "6", "train.eval_every": "0", "train.threads": "1", "checkpoint.save_every": "2",
    }  # fmt: skip
    return base | {name.replace("__", "."): value for name, value in changes.items()}

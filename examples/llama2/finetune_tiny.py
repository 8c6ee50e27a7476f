"""Fine-tune a table of letter pairs on a file of rows: the program that `transpiled_finetuning.md` generates code from.

python finetune_tiny.py ROWS OUT
"""

import itertools
import json
import math
import os
import sys

EPOCHS = 3
LEARNING_RATE = 0.5
BLOCK_BYTES = 512


def load_dataset(path: str) -> list[str]:
    """Read the rows block by block, as the loader of a large corpus does."""
    descriptor = os.open(path, os.O_RDONLY)
    blocks = []
    while block := os.read(descriptor, BLOCK_BYTES):
        blocks.append(block)
    os.close(descriptor)
    return [json.loads(line)["text"] for line in b"".join(blocks).splitlines()]


def train_loop(rows: list[str], log: int) -> dict[str, float]:
    """Take one step of gradient descent for each pair of letters; return the scores."""
    scores: dict[str, float] = {}
    for epoch in range(EPOCHS):
        loss, pairs = 0.0, 0
        for row in rows:
            for pair in map("".join, itertools.pairwise(row)):
                probability = 1 / (1 + math.exp(-scores.get(pair, 0.0)))
                loss, pairs = loss - math.log(probability), pairs + 1
                scores[pair] = scores.get(pair, 0.0) + LEARNING_RATE * (1 - probability)
        os.write(log, f"epoch {epoch + 1} loss {loss / pairs:.4f}\n".encode())
    return scores


def save_checkpoint(scores: dict[str, float], path: str) -> None:
    """Write the scores, and wait for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(descriptor, json.dumps(scores).encode())
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    save_checkpoint(train_loop(load_dataset(sys.argv[1]), sys.stdout.fileno()), sys.argv[2])

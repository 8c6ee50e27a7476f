"""Set up the process for a run: seeds, threads and the allocator."""

import torch

from entrenar.train.allocator import keep_freed_memory, return_freed_blocks
from entrenar.train.rng import seed_all
from entrenar.train.settings import TrainConfig


def prepare_process(config: TrainConfig) -> None:
    """Set seeds, threads and allocator for this process."""
    seed_all(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if keeps_freed_memory(config):
        keep_freed_memory()
    else:
        return_freed_blocks()


def keeps_freed_memory(config: TrainConfig) -> bool:
    """Return whether memory that a step frees stays with the process; offloading to disk is there to return it."""
    return config.freed_memory == "keep" and config.offload != "disk"

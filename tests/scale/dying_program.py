"""The command, as a rank that dies once its run has saved: `dying_program.py CHECKPOINTS RANK WORDS…`.

A rank that torchrun has started again lives.
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from entrenar.cli.main import main
from entrenar.runs import list_checkpoints

if __name__ == "__main__":
    checkpoints, rank = Path(sys.argv[1]), sys.argv[2]
    reduce = dist.all_reduce

    def all_reduce(tensor, **options):
        """Die between two sums."""
        if list_checkpoints(checkpoints):
            os.kill(os.getpid(), signal.SIGKILL)
        return reduce(tensor, **options)

    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        dist.all_reduce = all_reduce
    sys.exit(main(sys.argv[3:]))

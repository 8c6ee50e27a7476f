"""The command as one rank of several: rank 0 prints, the other ranks write their output into their logs.

Under `torchrun --max-restarts` the same command starts again after a rank has died, and then continues its run.
"""

import argparse
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from entrenar import scale
from entrenar.errors import ConfigError, EntrenarError
from entrenar.runs import RunFolder, list_checkpoints

_log = logging.getLogger("entrenar.ranks")


@contextmanager
def one_of_ranks(timeout_s: float) -> Iterator[None]:
    """Join the ranks, if torchrun started several; an error on a rank other than 0 begins with its number.

    A rank waits for the others for `timeout_s` at most.

    Raises:
        MachineError: the ranks cannot meet.
    """
    with scale.joined(timeout_s) as world:
        if world.is_writer:
            yield
            return
        ours = logging.getLogger("entrenar")
        ours.setLevel(logging.INFO)
        ours.propagate = False
        try:
            with redirect_stdout(_LogStream()):
                yield
        except EntrenarError as error:
            _log.error("%s: %s", type(error).__name__, error)
            raise type(error)(f"on rank {world.rank}: {error}") from error
        except Exception:
            _log.exception("on rank %d", world.rank)
            raise


def continue_if_restarted(parsed: argparse.Namespace, run_dir: Path) -> None:
    """Turn a start into a resume if torchrun has started this command before, or if --resume-if-any asks for it.

    The first start under torchrun has refused, or replaced as told, what another run left in the folder.

    Raises: ConfigError for flags that exclude each other.
    """
    if parsed.resume_if_any and (parsed.resume or parsed.overwrite):
        raise ConfigError("--resume-if-any excludes --resume and --overwrite; leave one out")
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not (is_restarted or parsed.resume_if_any):
        return
    parsed.overwrite = False
    if list_checkpoints(RunFolder(run_dir).checkpoints):
        parsed.resume = True


class _LogStream(io.TextIOBase):
    """A stream that logs each line, unless it is empty."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            _log.info("%s", line)
        return len(text)

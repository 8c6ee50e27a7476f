"""Standard output and error, whatever they are connected to: a terminal, a full disk, a closed pipe, nothing at all."""

import contextlib
import io
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Make both streams usable for any text: a closed one is replaced, a character that it cannot hold is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The lowest free descriptor is the closed one, so no data file can take its place.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # lives as long as we do
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str) -> None:
    """Write a line to standard error, if anyone can still read it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def abandon_output() -> None:
    """Drop what standard output could not take, so that the interpreter does not fail on it again while it exits."""
    with contextlib.suppress(OSError, ValueError):  # io.UnsupportedOperation is both: a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()

"""`entrenar watch RUN`: a run while it trains, in the terminal or as a page on this machine.

It only reads the run's files, so it may begin, end and be killed at any time, and needs no torch.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from entrenar.cli import flags
from entrenar.cli.watch_screen import LiveScreen
from entrenar.locks import is_held
from entrenar.report.follow import Follower
from entrenar.report.overview import describe, find_run, newest_run
from entrenar.report.serve import LivePage, PageServer
from entrenar.report.sight import Sight
from entrenar.report.step_line import event_line, step_line
from entrenar.runs import RunFolder

_EVERY_S = {True: 1.0, False: 10.0}  # on a terminal, and as lines
_LARGEST_PORT = 65535


class Screen(Protocol):
    """Where a run is shown."""

    def show(self, sight: Sight) -> None:
        """Show the current state of a run."""

    def close(self) -> None:
        """Leave what is shown in place."""


def run(words: Sequence[str]) -> int:
    """Show the run until it ends, or Ctrl-C; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    folder = find_run(parsed.runs_dir, parsed.run) if parsed.run else newest_run(parsed.runs_dir)
    if parsed.http is not None:
        return _serve(folder, parsed.http)
    is_terminal = _is_terminal()
    screen: Screen = LiveScreen() if is_terminal else Lines()
    every_s = parsed.every or _EVERY_S[is_terminal]
    with suppress(KeyboardInterrupt):  # the usual way to leave; the run goes on
        follow(folder, screen, lambda: time.sleep(every_s), is_once=parsed.once)
    print(f"\n{folder.name}: {describe(folder).status}\nNext: entrenar report {folder}")
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "watch", "See a run while it trains: live on a terminal, as lines in a pipe, or as a page in the browser."
    )
    arguments.epilog = "example: entrenar watch quickstart"
    arguments.add_argument(
        "run", nargs="?", metavar="RUN", help="name in the folder of runs, or a path (default: the one written to last)"
    )
    arguments.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    arguments.add_argument(
        "--every", type=flags.positive, metavar="SECONDS", help="default: 1 on a terminal, 10 elsewhere"
    )
    how = arguments.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="show the current state and exit")
    how.add_argument(
        "--http", type=_port, metavar="PORT", help="serve the report to browsers of this machine; 0 takes a free port"
    )
    return arguments


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or int(text) > _LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to {_LARGEST_PORT}, got {text!r}")
    return int(text)


def _is_terminal() -> bool:
    from rich.console import Console  # noqa: PLC0415  # 0.1 s that --help does not need

    return sys.stdout.isatty() and not Console().is_dumb_terminal


def follow(folder: Path, screen: Screen, wait: Callable[[], None], *, is_once: bool = False) -> None:
    """Show a run until no process holds it; `wait` is called between two looks.

    Raises: FormatError for a record of another program.
    """
    run, sight = RunFolder(folder), Sight(folder.name)
    follower = Follower(run)
    try:
        while True:
            is_running = is_held(run.lock)  # asked first: what is written before the end is read after it
            sight.take(follower.read(), is_running=is_running)
            screen.show(sight)
            if is_once or not is_running:
                return
            wait()
    finally:
        screen.close()


class Lines:
    """Plain lines: new events, new evaluations, and the newest step of each look."""

    def show(self, sight: Sight) -> None:
        """Print what is new."""
        for event in sight.new_events:
            print(event_line(event))
        for record in sight.new_evaluations:
            print(step_line(record, record.held_out, None))
        if sight.has_new_step and sight.last is not None and sight.last not in sight.new_evaluations:
            print(step_line(sight.last, sight.held_out, None))
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing is open."""


def _serve(folder: Path, port: int) -> int:
    with PageServer(LivePage(folder), port) as server:
        print(f"{server.url} shows {folder.name}; Ctrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0

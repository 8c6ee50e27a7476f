"""`entrenar trace live TRACE`: watch a trace in the terminal while it is made."""

import argparse
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from entrenar.trace.hot_paths import Profile, profile
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader
from entrenar.trace.report_text import duration, label

_ROWS = 12


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("trace", type=Path, help="a trace file that is being written, or the folder it lies in")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    parser.add_argument("--once", action="store_true", help="look once and end")


def execute(parsed: argparse.Namespace) -> int:
    """Show the trace until its program ends; return 0."""
    path = trace_file(parsed.trace)
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            with Reader(path) as reader:
                view, has_ended = picture(reader), reader.info().ended_ns is not None
            live.update(view, refresh=True)
            if has_ended or parsed.once:
                return 0
            time.sleep(parsed.every)


def picture(reader: Reader) -> Group:
    """Return the lines to show: where the program is now, where its time went, which events were anomalous."""
    summary = profile(reader)
    now = [span.name for span in reader.open_spans()]
    head = Text(f"{' '.join(reader.info().command)}\n", style="bold")
    head.append(f"now: {' > '.join(now) or 'no span'}   {summary.calls:,} system calls, {duration(summary.call_ns)}")
    anomalies = reader.last_anomalies(5)
    tail = Text("\n".join(f"⚠️ {one.operation} {duration(one.duration_ns)} ({one.sigma:.1f}σ)" for one in anomalies))
    return Group(head, _table(summary), tail)


def _table(summary: Profile) -> Table:
    table = Table("share", "time", "calls", "where", box=None)
    for row in summary.rows[:_ROWS]:
        table.add_row(f"{row.share:.1%}", duration(row.total_ns), f"{row.calls:,}", label(row, with_source=True))
    return table

"""`entrenar quality figure`: hold a number in a JSON file of results against a bound."""

import argparse
from pathlib import Path

from entrenar.errors import ConfigError, GateFailed
from entrenar.quality.figures import figures, ratios


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("at", metavar="PLACE", help="keys with dots between them; * is every one, and all must hold")
    parser.add_argument("--over", metavar="PLACE", help="divide by the number there")
    parser.add_argument("--least", type=float, metavar="N")
    parser.add_argument("--most", type=float, metavar="N")
    parser.set_defaults(check=_figure)


def _figure(parsed: argparse.Namespace) -> int:
    if (parsed.least is None) == (parsed.most is None):
        raise ConfigError("a figure is held against one bound: give --least or --most")
    found = figures(parsed.project / parsed.file, parsed.at)
    if parsed.over is not None:
        found = ratios(found, figures(parsed.project / parsed.file, parsed.over))
    worst = min(found) if parsed.most is None else max(found)
    over = "" if parsed.over is None else f" over {parsed.over}"
    print(f"figure {worst:.10g} (the worst of {len(found)} at {parsed.at}{over} in {parsed.file})")
    holds = worst >= parsed.least if parsed.most is None else worst <= parsed.most
    if not holds:
        bound = f"at least {parsed.least:g}" if parsed.most is None else f"at most {parsed.most:g}"
        raise GateFailed(f"{parsed.file}: {parsed.at}{over} is {worst:.10g}, {bound} wanted")
    return 0

"""`entrenar quality VERB`: gates on a Python tree, one file a verb. Loads no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from entrenar.cli.quality import mutate, risk

_VERBS = {
    "mutate": (mutate.add, "plant mutants and count those that the tests kill"),
    "risk": (risk.add, "hold measured coverage against the floors"),
}


def run(words: Sequence[str]) -> int:
    """Run one check; return 0 if its floors hold."""
    parser = argparse.ArgumentParser(
        prog="entrenar quality", description="Gates on a Python tree, by quality/risk.toml.", allow_abbrev=False
    )
    parser.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="root of the tree (default: here)")
    verbs = parser.add_subparsers(required=True, metavar=" | ".join(_VERBS))
    for name, (add, line) in _VERBS.items():
        add(verbs.add_parser(name, help=line, description=line, allow_abbrev=False))
    parsed = parser.parse_args(words)
    return int(parsed.check(parsed))

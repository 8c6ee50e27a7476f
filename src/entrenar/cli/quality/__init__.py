"""`entrenar quality VERB`: gates on a Python tree, one file a verb. Loads no torch, and only the verb asked for."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

VERBS = {
    "tdg": "score technical debt: 0 to 100 for each function, file and the tree",
    "check-quality": "hold the scores against the grades that are demanded",
    "baseline": "keep the scores, to compare with later",
    "check-regression": "hold the scores against the baseline",
    "history": "the scores at commits, tags and checkpoints",
    "roadmap": "make a roadmap from a specification, and run the commands of its criteria",
    "prompt": "print a workflow prompt, filled with facts of the repository",
    "mutate": "plant mutants and count those that the tests kill",
    "gate": "run what a tier asks for, or show that each gate can fail",
    "chaos": "run a command with little memory, a small disk, a slow core, or a kill",
    "figure": "hold a number in a JSON file of results against a bound",
    "risk": "hold measured coverage against the floors",
}
_OF_DEBT = ("check-quality", "baseline", "check-regression", "history")  # also as `tdg VERB`, as PMAT spells them


def run(words: Sequence[str]) -> int:
    """Run one check; return 0 if its floors hold."""
    parser = argparse.ArgumentParser(
        prog="entrenar quality", description="Gates on a Python tree, decided by measurements.", allow_abbrev=False
    )
    parser.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="root of the tree (default: here)")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    spelled = _spelled(words)
    asked = next((word for word in spelled if word in VERBS), None)
    for name, line in VERBS.items():
        verb = verbs.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.", allow_abbrev=False)
        if name == asked:
            importlib.import_module(f"entrenar.cli.quality.{name.replace('-', '_')}").add(verb)
    parsed = parser.parse_args(spelled)
    return int(parsed.check(parsed))


def _spelled(words: Sequence[str]) -> list[str]:
    """Return the words, `tdg VERB` as VERB."""
    spelled = list(words)
    if "tdg" in spelled[:-1]:
        place = spelled.index("tdg")
        if spelled[place + 1] in _OF_DEBT:
            del spelled[place]
    return spelled

"""`entrenar config print|validate|diff|schema`."""

import json
from collections.abc import Sequence
from pathlib import Path

from entrenar.cli import flags
from entrenar.config import RunConfig, difference
from entrenar.config_file import load_config, to_toml


def run(words: Sequence[str]) -> int:
    """Run the action in the first word; return the exit code."""
    arguments = flags.parser("config", "Inspect run configs without running anything.")
    actions = arguments.add_subparsers(dest="action", required=True, metavar="print|validate|diff|schema")
    for action, text in (("print", "the resolved config as TOML"), ("validate", "check a config")):
        flags.add_config_flags(actions.add_parser(action, help=text))
    diff = actions.add_parser("diff", help="the options in which two configs differ")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)
    actions.add_parser("schema", help="the JSON schema of a config file")
    parsed = flags.parse(arguments, words)
    if parsed.action == "schema":
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
    elif parsed.action == "diff":
        return _diff(parsed.old, parsed.new)
    elif parsed.action == "print":
        print(to_toml(flags.config_of(parsed)), end="")
    else:
        config = flags.config_of(parsed)
        print(f"{parsed.config or 'the defaults'}: valid; {config.model.parameter_count():,} parameters")
    return 0


def _diff(old: Path, new: Path) -> int:
    lines = difference(load_config(old), load_config(new))
    print("\n".join(lines) if lines else "no difference")
    return 1 if lines else 0

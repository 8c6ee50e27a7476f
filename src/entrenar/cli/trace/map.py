"""`entrenar trace map MAP… [--at FILE:LINE]`: where generated code was written."""

import argparse
from pathlib import Path

from entrenar.errors import ConfigError
from entrenar.trace.generated_code import load_maps
from entrenar.trace.source_map import SourceMap


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "maps", type=Path, nargs="+", metavar="MAP",
        help="a source map (version 1 or 3), a notebook next to its export, Cython's C, or what torch.compile left",
    )  # fmt: skip
    parser.add_argument("--at", metavar="FILE:LINE", help="tell the origin of this line only")


def execute(parsed: argparse.Namespace) -> int:
    """Print origins; return 0, or 1 if the map does not contain the requested line."""
    maps = load_maps(parsed.maps)
    if parsed.at is None:
        _print_all(maps)
        return 0
    file, _, line = parsed.at.rpartition(":")
    if not file or not line.isdigit():
        raise ConfigError(f"--at must be FILE:LINE, as in out.py:12, got {parsed.at!r}")
    origin = maps.origin(str(Path(file).resolve()), int(line)) or maps.origin(file, int(line))
    print(f"{parsed.at} is not in the map" if origin is None else f"{parsed.at} {origin}")
    return int(origin is None)


def _print_all(maps: SourceMap) -> None:
    for generated, entries in maps.lines.items():
        print(generated)
        for line, origin in entries:
            if origin is not None:
                note = f"  {origin.note}" if origin.note else ""
                print(f"  {line:>5} {maps.origin(generated, line)}{note}")

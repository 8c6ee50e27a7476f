"""What a test run showed about each operation, kept as figures: `pytest --certificate PATH` writes them as JSON.

The file is {operation: {kind: [figures, …]}}. Tests add to it through the fixture `certificate`; a property's counted
cases are added by `tests/conftest.py`, under the operations that its marker names.
"""

import json
from pathlib import Path
from typing import Any

KINDS = ("derivation", "gradcheck", "error", "property", "shapes", "controls", "behavior")


class Certificate:
    """Figures by operation and kind."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(self, op: str, kind: str, **figures: Any) -> None:
        """Keep what was shown for an operation; a row of a variant (attention/packed) counts for its operation."""
        assert kind in KINDS, f"{kind} is none of {KINDS}"
        self.figures.setdefault(op.split("/", maxsplit=1)[0], {}).setdefault(kind, []).append(figures)

    def write(self, path: Path) -> None:
        """Write all figures, in an order that does not depend on the tests'."""
        ordered = {
            op: {kind: sorted(rows, key=json.dumps) for kind, rows in sorted(kinds.items())}
            for op, kinds in sorted(self.figures.items())
        }
        path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")

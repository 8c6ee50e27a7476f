"""Raw figures of the benchmarks, and Markdown tables of them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def result(name: str) -> Any:
    """Return the raw figures of a benchmark; None where it was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rows(header: list[str], lines: list[list[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join(["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]) + "\n"

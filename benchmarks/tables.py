"""Write the measured tables into README and book from the raw JSON: `python benchmarks/tables.py [--check]`.

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`; nothing between them is written by hand.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def result(name: str) -> Any:
    """Return the raw figures of a benchmark; None where it was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rows(header: list[str], lines: list[list[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join(["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]) + "\n"


def train_step() -> str:
    """Ours against transformers, a step of the 124m preset."""
    lines = []
    for precision in ("bfloat16", "float32"):
        figures = result(f"train_step_{precision}")
        if figures is None:
            lines.append([precision, *["not measured"] * 5])
            continue
        speed, peak = figures["tokens_per_s"], figures["peak_bytes"]
        share = figures["share_of_peak"]["ours"]
        lines.append(
            [
                precision,
                f"{speed['ours']:.0f}",
                f"{speed['transformers']:.0f}",
                f"**{figures['speed_over_transformers']:.2f} ×**",
                ", ".join(f"{value:.2f} of {dtype}" for dtype, value in sorted(share.items())),
                f"{peak['ours'] / 1e9:.2f} GB against {peak['transformers'] / 1e9:.2f}: "
                f"**{figures['peak_over_transformers']:.2f} ×** (added to imports: "
                f"{figures['added_peak_over_transformers']:.2f} ×)",
            ]
        )
    figures = result("train_step_bfloat16") or result("train_step_float32") or {}
    note = f"\n{figures.get('cpu', '')}; torch {figures.get('torch', '')}; {figures.get('date', '')}; "
    header = ["precision", "ours, tokens/s", "transformers", "speed", "share of product peak", "peak memory"]
    return rows(header, lines) + note + "`python benchmarks/train_step.py --precision …`\n"


def ops() -> str:
    """Every op against torch's alternatives, forward and backward."""
    report = result("ops")
    if report is None:
        return "not measured\n"
    lines = [
        [r["op"], r["dtype"], r["alternative"], f"{r['median_ms']:.1f}", f"{r['peak_mib']:.1f}"]
        for r in report["results"]
        if r["phase"] != "forward"
    ]
    load = report["load_average_before_and_after"]
    note = f"\n{report['processor']}, {report['threads']} threads; torch {report['torch']}; {report['date']}; "
    note += f"load average {load[0]} before, {load[1]} after; `python benchmarks/ops.py`\n"
    return rows(["op", "stored in", "path", "forward + backward, ms", "peak, MiB"], lines) + note


TABLES: dict[str, Callable[[], str]] = {"train_step": train_step, "ops": ops}


def filled(text: str) -> str:
    """Return a page with its tables written anew."""
    return _BLOCK.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[3], text)


def main() -> int:
    """Write the tables, or with --check say which pages are stale."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        if "--check" in sys.argv:
            print(f"{page.relative_to(ROOT)} is stale: run python benchmarks/tables.py")
        else:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

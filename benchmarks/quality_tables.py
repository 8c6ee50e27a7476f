"""The tables of quality/results: what mutants, properties and fuzzing showed. `benchmarks/tables.py` writes them."""

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]], str]

# libFuzzer's exit codes that name no fault.
_ENDS = {0: "none", 72: "none; stopped before the end"}


def mutation(measured: dict[str, Any]) -> Table:
    """Scores of each file, and of all."""
    whole = {"all": {key: value for key, value in measured.items() if key not in ("files", "mutants")}}
    lines = [
        [
            f"`{name.removeprefix('src/entrenar/')}`", str(row["total_mutants"]), str(row["killed"]),
            f"{row['survived']} ({row['survived_but_argued']})", str(row["timeouts"] + row["errors"]),
            f"{row['mutation_score']:.1f} %", f"{row['strict_score']:.1f} %",
        ]
        for name, row in sorted(measured["files"].items()) + list(whole.items())
    ]  # fmt: skip
    return ["file", "mutants", "killed", "survived (argued)", "no verdict", "score", "strict score"], lines, ""


def properties(measured: dict[str, Any]) -> Table:
    """How many cases the properties of each file held in."""
    lines = []
    for file in sorted({name.partition("::")[0] for name in measured["properties"]}):
        found = [row for name, row in measured["properties"].items() if name.startswith(file)]
        counts = [row["cases"] for row in found]
        seconds = sum(row["cpu_s"] for row in found)
        lines.append([f"`{file}`", str(len(found)), f"{sum(counts):,}", f"{min(counts):,}", f"{seconds:,.0f} s"])
    dates = " to ".join(sorted({row["date"] for row in measured["properties"].values()}))
    note = f"\n{measured['count']} properties, {measured['cases']:,} cases; {dates}; `make property-10k`\n"
    return ["file", "properties", "cases", "fewest of one", "processor time"], lines, note


def fuzz(measured: dict[str, Any]) -> Table:
    """Inputs of each target, and how soon its planted fault was found."""
    lines = [
        [f"`{name}`", f"{row['runs']:,}", _ENDS.get(row["exit"], "**found**"), str(row["edges"]),
         f"{row['control_found_after']:,} inputs", f"{row['elapsed_s']:,.0f} s", row["date"]]
        for name, row in measured["targets"].items()
    ]  # fmt: skip
    header = ["target", "inputs", "faults", "edges reached", "planted fault found after", "time", "date"]
    return header, lines, "\n`make fuzz`\n"


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {"mutation": mutation, "properties": properties, "fuzz": fuzz}

"""Tables of the technical-debt score: what it gives this repository, how it agrees with other measures, its time."""

import statistics
from collections import defaultdict
from typing import Any

Table = tuple[list[str], list[list[str]], str]


def repository(baseline: dict[str, Any]) -> Table:
    """Mean and weakest file of each part of this repository, from the committed baseline."""
    parts: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, score in baseline["files"].items():
        words = name.split("/")
        parts["/".join(words[:3]) if words[0] == "src" and len(words) > 3 else words[0]].append((score, name))
    lines = []
    for part, rows in sorted(parts.items()):
        score, name = min(rows)
        lines.append([f"`{part}`", str(len(rows)), f"{statistics.fmean(row[0] for row in rows):.1f}",
                      f"{score:.1f} `{name.removeprefix(part).lstrip('/')}`"])  # fmt: skip
    lines.append(["all", str(len(baseline["files"])), f"**{baseline['score']:.1f}**", ""])
    versions = ", ".join(f"{name} {version}" for name, version in baseline["scorer"].items())
    return ["", "files", "mean score", "weakest file"], lines, f"\n`.pmat/tdg-baseline.json`; {versions}\n"


def fixes(measured: dict[str, Any]) -> Table:
    """Rank correlation of scores with the bug fixes of the following years."""
    lines = [
        [name, str(row["files"]), str(row["fixes"]), f"**{row['debt']:.2f}**", f"{row['lizard_total_complexity']:.2f}",
         f"{row['lines']:.2f}", f"{100 * row['share_of_fixes_in_the_worst_fifth']:.0f} %"]
        for name, row in sorted(measured.get("fixes", {}).items())
    ]  # fmt: skip
    header = ["history", "files", "fixes", "debt", "lizard, total paths", "code lines", "fixes in the worst fifth"]
    return header, lines, f"\nSpearman's rank correlation with fixes in 3 years; {measured['date']}\n"


def tools(measured: dict[str, Any]) -> Table:
    """Rank correlation of scores with what lizard and radon measure."""
    lines = [
        [name, str(row["files"]), f"{row['score']:.1f}", f"{row['lizard_highest_complexity']:.2f}",
         f"{row['lizard_total_complexity']:.2f}", f"{row['radon_maintainability']:.2f}", f"{row['lines']:.2f}"]
        for name, row in sorted(measured.get("tools", {}).items())
    ]  # fmt: skip
    header = ["package", "files", "score", "lizard, highest", "lizard, total", "radon, maintainability", "code lines"]
    return header, lines, f"\nSpearman's rank correlation of debt with each, over files; {measured['date']}\n"


def seconds(measured: dict[str, Any]) -> Table:
    """Wall and processor time."""
    lines = []
    for name, row in sorted(measured.get("time", {}).items()):
        runs = [f"{run['cpu_s']:.1f} s ({run['wall_s']:.1f} s)" for run in (row["first"], row["again"])]
        lines.append([name, f"{row['lines']:,}", str(row["files"]), *runs])
    header = ["", "lines", "files", "first, processor (wall)", "again"]
    loads = sorted(row["load"] for row in measured.get("time", {}).values())
    note = f"\n{measured['cpu']}; {measured['date']}; load of the machine {loads}, which lengthens wall times\n"
    return header, lines, note

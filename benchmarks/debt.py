"""How well the technical-debt score agrees with other measures, and how long it takes.

    python benchmarks/debt.py --packages jinja2 rich …        installed packages: ranks of radon and lizard
    python benchmarks/debt.py --history flask=DIR:src/flask   a clone: bug fixes to each file in the following years
    python benchmarks/debt.py --time src torch                wall and processor seconds, first and again

A history is scored at the commit YEARS before its last, from git's objects; then later commits are counted that touch a
file and whose subject speaks of a fix. Files that were renamed or deleted since take no part. All agreement is
Spearman's rank correlation, positive where more debt goes with more of the other measure; `lines` is what any measure
of size would give. The file of results keeps what is not measured again.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lizard
import numpy as np
import radon.metrics
import turns

from entrenar.quality import git
from entrenar.quality.debt import measure, scoring
from entrenar.quality.debt.score import TreeScore

YEARS = 3
FIX = re.compile(r"\b(fix(es|ed)?|bugs?|regressions?|crash(es)?)\b", re.IGNORECASE)
COSMETIC = re.compile(
    r"\b(typos?|docs?|docstrings?|lint|flake8|mypy|typing|spelling|tests?|ci|changelog)\b", re.IGNORECASE
)


def correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's coefficient: Pearson's of the ranks, equal values sharing theirs."""
    return round(float(np.corrcoef(ranks(one), ranks(other))[0, 1]), 3)


def ranks(values: list[float]) -> Any:
    """Return the rank of each value."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2


def package_folder(name: str) -> Path:
    """Return where an installed package lies."""
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name} is not installed"
    assert found.origin is not None
    return Path(found.origin).parent


def against_tools(folder: Path) -> dict[str, Any]:
    """Compare the ranks of a package's files with lizard's and radon's."""
    tree = scoring.score_path(folder, folder)
    debt, lines = [100 - file.score for file in tree.files], [float(file.code_lines) for file in tree.files]
    highest, total, index = [], [], []
    for file in tree.files:
        text = (folder / file.path.removeprefix(f"{folder.name}/")).read_text(encoding="utf-8", errors="replace")
        paths = [
            one.cyclomatic_complexity for one in lizard.analyze_file.analyze_source_code("a.py", text).function_list
        ]
        highest.append(max(paths, default=0))
        total.append(sum(paths))
        index.append(-radon.metrics.mi_visit(text, multi=True))
    return {
        "files": len(tree.files), "score": round(tree.score or 0, 2),
        "lizard_highest_complexity": correlation(debt, highest), "lizard_total_complexity": correlation(debt, total),
        "radon_maintainability": correlation(debt, index), "lines": correlation(debt, lines),
    }  # fmt: skip


def against_fixes(folder: Path, path: str) -> dict[str, Any]:
    """Compare scores with the bug fixes that followed."""
    repository = git.at(folder)
    last = repository.commits(["--max-count=1", "HEAD"])[0]
    begin = f"{int(last.date[:4]) - YEARS}{last.date[4:]}"
    (then,) = repository.commits(["--max-count=1", f"--before={begin}", "HEAD"])
    tree = scoring.score(scoring.tree_of_revision(repository, then.hash, Path(path), folder), None)
    now = {blob.path for blob in repository.blobs("HEAD", [path])}
    fixes = count_fixes(folder, then.hash, path)
    files = [file for file in tree.files if file.path in now]
    debt, counts = [100 - file.score for file in files], [float(fixes[file.path]) for file in files]
    lines = [float(file.code_lines) for file in files]
    complexity = lizard_totals(repository, tree, then.hash)
    return {
        "scored_at": then.date[:10], "until": last.date[:10], "files": len(files), "fixes": int(sum(counts)),
        "files_with_fixes": sum(count > 0 for count in counts), "debt": correlation(debt, counts),
        "lines": correlation(lines, counts),
        "lizard_total_complexity": correlation([complexity[file.path] for file in files], counts),
        "share_of_fixes_in_the_worst_fifth": round(share_in_worst_fifth(debt, counts), 3),
    }  # fmt: skip


def count_fixes(folder: Path, since: str, path: str) -> Counter[str]:
    """Count the commits since a commit that touch each file and speak of a fix."""
    command = [
        "git",
        "-C",
        str(folder),
        "log",
        "--no-merges",
        "--name-only",
        "--format=%x00%s",
        f"{since}..HEAD",
        "--",
        path,
    ]
    counts: Counter[str] = Counter()
    for entry in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[1:]:
        subject, *names = entry.strip().split("\n")
        if FIX.search(subject) and not COSMETIC.search(subject):
            counts.update(name for name in names if name)
    return counts


def lizard_totals(repository: git.Repository, tree: TreeScore, commit: str) -> dict[str, float]:
    """Return lizard's total complexity of each file at a commit."""
    blobs = {blob.path: blob.hash for blob in repository.blobs(commit)}
    contents = repository.read([blobs[file.path] for file in tree.files])
    totals = {}
    for file in tree.files:
        text = contents[blobs[file.path]].decode("utf-8", "replace")
        functions = lizard.analyze_file.analyze_source_code("a.py", text).function_list
        totals[file.path] = float(sum(one.cyclomatic_complexity for one in functions))
    return totals


def share_in_worst_fifth(debt: list[float], counts: list[float]) -> float:
    """Return which part of the fixes fell to the fifth of files with most debt."""
    ranked = sorted(zip(debt, counts, strict=True), key=lambda row: -row[0])
    worst = ranked[: max(1, len(ranked) // 5)]
    return sum(count for _, count in worst) / max(1.0, sum(counts))


def timed(folder: Path) -> dict[str, Any]:
    """Time `entrenar quality tdg` on a copy in a repository of its own, twice: the second run finds the cache."""
    runs, command = [], [sys.executable, "-m", "entrenar", "quality", "tdg", ".", "--format", "json"]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        subprocess.run(["git", "init", "-q", place], check=True)
        for _ in range(2):
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            runs.append({"wall_s": round(time.monotonic() - started, 2), "cpu_s": round(cpu_s, 2)})
    table = json.loads(done.stdout)
    lines = sum(len(path.read_bytes().splitlines()) for path in folder.rglob("*.py"))
    return {
        "lines": lines, "code_lines": sum(file["code_lines"] for file in table["files"]), "files": len(table["files"]),
        "score": table["score"], "not_measured": len(table["not_measured"]), "first": runs[0], "again": runs[1],
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    """Measure what is asked for, and keep it in benchmarks/results/debt.json."""
    parser = argparse.ArgumentParser(description="Agreement and time of the technical-debt score.")
    parser.add_argument("--packages", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--history", action="append", default=[], metavar="NAME=DIR:PATH")
    parser.add_argument("--time", nargs="*", default=[], metavar="FOLDER_OR_PACKAGE")
    options = parser.parse_args()
    place = turns.RESULTS / "debt.json"
    results: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    results |= {**turns.machine(), "scorer": measure.scorer()}
    for name in options.packages:
        results.setdefault("tools", {})[name] = against_tools(package_folder(name))
        print(name, results["tools"][name])
    for word in options.history:
        name, _, rest = word.partition("=")
        folder, _, path = rest.rpartition(":")
        results.setdefault("fixes", {})[name] = against_fixes(Path(folder), path)
        print(name, results["fixes"][name])
    for name in options.time:
        folder = Path(name) if Path(name).is_dir() else package_folder(name)
        results.setdefault("time", {})[name] = timed(folder)
        print(name, results["time"][name])
    turns.write_result("debt", results)


if __name__ == "__main__":
    main()

"""How long a tier takes from key press to verdict: `make tier1` ten times cold, and ten times with the resident server.

    python benchmarks/tiers.py                 tier1, cold and resident
    python benchmarks/tiers.py tier2 --runs 1  any other tier
    python benchmarks/tiers.py hooks-run       the hooks that a commit runs

Wall time is what a person waits; CPU time (user and system, of all processes) is what another machine can compare.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import turns

ROOT = Path(__file__).parents[1]


def once(tier: str) -> dict[str, float]:
    """Run a tier once; it must pass."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(["make", "--no-print-directory", tier], cwd=ROOT, check=True, capture_output=True)
    elapsed_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(elapsed_s, 3), "cpu_s": round(cpu_s, 3), "load": round(os.getloadavg()[0], 2)}


def measured(tier: str, runs: int) -> dict[str, Any]:
    """Run a tier several times; return each run, and the 95th percentile."""
    found = [once(tier) for _ in range(runs)]
    summary = {}
    for figure in ("wall_s", "cpu_s"):
        values = sorted(run[figure] for run in found)
        summary[f"median_{figure}"] = statistics.median(values)
        summary[f"p95_{figure}"] = values[-1] if runs < 20 else values[int(0.95 * runs)]
    return {**summary, "runs": found}


def main() -> None:
    """Measure, and keep the figures in benchmarks/results/tiers.json."""
    parser = argparse.ArgumentParser(description="Time the tiers.")
    parser.add_argument("tier", nargs="?", default="tier1")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    path = turns.RESULTS / "tiers.json"
    known = json.loads(path.read_text())["tiers"] if path.exists() else {}
    results = {**turns.machine(), "tiers": {**known, options.tier: {"cold": measured(options.tier, options.runs)}}}
    if options.tier == "tier1":
        server = subprocess.Popen(["make", "tier1-serve"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        while "serving" not in server.stderr.readline():
            assert server.poll() is None, "the server did not start"
        try:
            results["tiers"]["tier1"]["resident"] = measured("tier1", options.runs)
        finally:
            server.terminate()
            (ROOT / ".test-server").unlink(missing_ok=True)
    print(turns.write_result("tiers", results))
    for name, kinds in results["tiers"].items():
        for kind, figures in kinds.items():
            print(
                f"{name} {kind}: p95 {figures['p95_wall_s']:.2f} s wall, {figures['p95_cpu_s']:.2f} s CPU ({path.name})"
            )


if __name__ == "__main__":
    main()

"""Run the fuzz targets, each after a control: the planted fault must be found, else the fuzzer shows nothing.

    python fuzz/run.py --runs 1000000 --out quality/results/fuzz.json [TARGET…]

An input that breaks a target is left in fuzz/ as crash-TARGET-…: it becomes a regression test.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = sorted(path.stem for path in (HERE / "fuzz_targets").glob("*.py"))
CRASHED = 77
CONTROL_RUNS = 300_000
FULL_RUNS = 1_000_000
SLOW = {"documents": 10}  # writes files for each input: a tenth of the inputs


def run(target: str, runs: int, *, planted: bool) -> tuple[int, dict[str, int], str]:
    """Run one target; return its exit code, libFuzzer's counts, and the end of what it said."""
    dictionary = HERE / "fuzz_targets" / f"{target}.dict"
    with tempfile.TemporaryDirectory() as corpus:
        artifacts = corpus + "/" if planted else f"{HERE}/crash-{target}-"
        command = [
            sys.executable, str(HERE / "fuzz_targets" / f"{target}.py"), f"-runs={runs}", "-max_len=1024",
            "-timeout=10", "-len_control=0", "-rss_limit_mb=3000", "-print_final_stats=1",
            f"-artifact_prefix={artifacts}",
            *([f"-dict={dictionary}"] if dictionary.is_file() else []), *(["--planted"] if planted else []), corpus,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        said = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    counts = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", said.stderr)}
    edges = re.findall(r"cov: (\d+)", said.stderr)
    return said.returncode, counts | ({"edges": int(edges[-1])} if edges else {}), said.stderr[-2000:]


def earlier(out: Path | None) -> dict[str, Any]:
    """Return the results of targets that were run before; each has its own date."""
    if out is None or not out.is_file():
        return {}
    targets: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["targets"]
    return targets


def main() -> int:
    """Run controls and targets; return 0 if every control is found and no target breaks."""
    parser = argparse.ArgumentParser(description="Fuzz tokenizer, model input, loaders and documents.")
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=f"among {', '.join(TARGETS)}")
    parser.add_argument("--runs", type=int, default=FULL_RUNS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results, failed = earlier(options.out), False
    for target in options.targets:
        status, counts, said = run(target, CONTROL_RUNS, planted=True)
        is_found = status == CRASHED
        control = counts.get("number_of_executed_units")
        print(f"{target}: planted fault {'found' if is_found else 'NOT FOUND'} after {control} runs")
        started = datetime.now(UTC)
        runs = options.runs // SLOW.get(target, 1)
        status, counts, said = run(target, runs, planted=False)
        done = counts.get("number_of_executed_units", 0)
        is_sound = status == 0 and done >= runs
        print(f"{target}: {done} runs, {counts.get('edges')} edges, {'no fault' if is_sound else f'exit {status}'}")
        if not is_sound:
            print(said, file=sys.stderr)
        failed |= not (is_found and is_sound)
        results[target] = {
            "runs": done, "share_of_full": round(done * SLOW.get(target, 1) / FULL_RUNS, 3),
            "date": started.date().isoformat(), "edges": counts.get("edges"),
            "new_units": counts.get("new_units_added"), "exit": status,
            "elapsed_s": round((datetime.now(UTC) - started).total_seconds(), 1), "control_found_after": control,
        }  # fmt: skip
    if options.out:
        facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**facts, "targets": results}, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

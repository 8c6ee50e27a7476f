"""Let the kernel itself fail the N-th system call of a command (strace's injection), as a check of `nth_operation.py`.

    python benchmarks/strace_faults.py --most 6       # writes benchmarks/results/strace_faults.json

The seam in `files.py` that the N-th operation tests use could miss a call; the kernel does not. For each command, call
and error: N from 1 until the command no longer meets its N-th call, at most `--most`. A case is good if the command
ends with its result, or with exit 2 or 3 and one sentence without a traceback, and if the same command then works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from nth_operation import inputs
from turns import machine, write_result

CALLS = ("fsync", "rename", "mkdir", "unlink")
ERRORS = ("EIO", "EINTR", "ENOSPC", "EDQUOT")
GOOD_CODES = (0, 2, 3)


def commands(base: Path, out: Path) -> dict[str, list[str]]:
    """Return the commands, each writing below `out`."""
    return {
        "prepare": ["prepare", f"{base}/text.txt", "--out", f"{out}/corpus", "--vocab-size", "300", "--if-missing"],
        "convert": ["convert", f"{base}/base", f"{out}/nf4", "--to", "nf4", "--overwrite"],
        "finetune": ["finetune", "--model", f"{base}/base", "--data", f"{base}/rows.jsonl", "--runs-dir", str(out),
                     "--max-steps", "2", "--eval-fraction", "0", "--sample-answers", "0", "--threads", "1",
                     "--overwrite"],
    }  # fmt: skip


def run(words: list[str], injected: str | None = None) -> tuple[int, str, int]:
    """Run a command; return its exit code, what it said, and how many calls were made to fail."""
    with tempfile.NamedTemporaryFile("r") as log:
        tracer = [] if injected is None else ["strace", "-f", "-qq", "-o", log.name, "-e", f"inject={injected}",
                                              "-e", f"trace={injected.partition(':')[0]}"]  # fmt: skip
        ended = subprocess.run(
            [*tracer, sys.executable, "-m", "entrenar", *words], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return ended.returncode, ended.stderr, log.read().count("(INJECTED)")


def attack(base: Path, name: str, most: int) -> dict[str, Any]:
    """Fail one call after the other of a command."""
    endings: Counter[str] = Counter()
    bugs, cases = [], 0
    for call in CALLS:
        for number in range(1, most + 1):
            error = ERRORS[(number + CALLS.index(call)) % len(ERRORS)]
            with tempfile.TemporaryDirectory() as out:
                words = commands(base, Path(out))[name]
                code, said, hits = run(words, f"{call}:error={error}:when={number}")
                if not hits:
                    break
                cases += 1
                endings["ended" if code == 0 else f"exit {code}"] += 1
                again, _, _ = run(words)
                if code not in GOOD_CODES or "Traceback" in said or again != 0:
                    bugs.append({"call": call, "number": number, "error": error, "code": code, "again": again,
                                 "said": said[-300:]})  # fmt: skip
                    print(json.dumps(bugs[-1]), file=sys.stderr, flush=True)
    return {"cases": cases, "endings": dict(endings), "bugs": bugs}


def main() -> int:
    """Attack each command; return 1 if a case is a bug."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--most", type=int, default=6)
    parsed = arguments.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        inputs(Path(name))
        for road in commands(Path(name), Path(name)):
            found[road] = attack(Path(name), road, parsed.most)
            print(road, json.dumps({key: found[road][key] for key in ("cases", "endings")}), flush=True)
    write_result("strace_faults", {**machine(), "most": parsed.most, "commands": found})
    return int(any(row["bugs"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())

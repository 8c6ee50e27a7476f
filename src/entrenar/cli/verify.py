"""`entrenar verify ops`: run the tests of the operations and print one certificate for each.

$ entrenar verify ops
$ entrenar verify ops --against quality/certificates.json
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, GateFailed
from entrenar.files import write_json
from entrenar.quality.certificate import (
    NOT_MEASURED,
    Certificate,
    certificates,
    coverage_of,
    demand_no_loss,
    mutants_of,
)
from entrenar.version import __version__

_TESTS = ("tests/ops", "tests/proofs")
_SINGLE_TESTS = ("tests/property_llama.py", "tests/gradient_llama.py")
# Operations whose file has another name than they have.
_FILES = {"nf4": "quantized/nf4", "quantized_linear": "quantized/linear"}


def run(words: Sequence[str]) -> int:
    """Print the certificates; return 0 if every test passed and nothing got worse."""
    parser = argparse.ArgumentParser(
        prog="entrenar verify", allow_abbrev=False, description="Prove and measure the operations of a checkout."
    )
    parser.add_argument("what", choices=("ops",))
    parser.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="a checkout (default: here)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON here")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="exit with 1 if something in FILE is no longer shown"
    )
    parsed = parser.parse_args(words)
    root: Path = parsed.project
    found = certificates(
        _shown(root), mutants_of(root / "quality/results/mutation.json"), coverage_of(root / "coverage.json"), _source
    )
    whole = {**_setting(), "operations": found}
    print(json.dumps(whole, indent=1) if parsed.json else "\n".join(_text(whole)))
    if parsed.out:
        write_json(parsed.out, whole)
    if parsed.against:
        demand_no_loss(parsed.against, found)
    return 0


def _shown(root: Path) -> dict[str, Any]:
    """Run the tests of a checkout and return their results.

    Raises:
        ConfigError: the folder is not a checkout.
        GateFailed: a test fails.
    """
    if not (root / "tests" / "ops").is_dir():
        raise ConfigError(
            f"certificates come from the tests, and {root.resolve()} has no tests/ops; "
            "run in a clone of the project, or name one with --project DIR"
        )
    tests = [
        *_TESTS,
        *_SINGLE_TESTS,
        *(str(p.relative_to(root)) for p in sorted(root.glob("tests/mutation_resistant_*.py"))),
    ]
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / "shown.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--certificate={shown}"]
        result = subprocess.run(
            [*command, *(test for test in tests if (root / test).exists())],
            check=False, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if result.returncode or not shown.is_file():
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
            raise GateFailed(f"no certificate: the tests of the operations ended with {result.returncode}\n{tail}")
        facts: dict[str, Any] = json.loads(shown.read_text(encoding="utf-8"))
        return facts


def _source(op: str) -> str:
    return f"src/entrenar/ops/{_FILES.get(op, op)}.py"


def _setting() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "entrenar": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "sympy", "hypothesis")},
        },
    }


def _text(whole: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    yield f"{whole['date']}  {whole['machine']}  {versions}"
    for op, certificate in whole["operations"].items():
        yield ""
        yield op
        for name, value in _rows(certificate):
            yield f"  {name:<22} {value}"


def _rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    derivations = certificate["derivation"]
    partials = sum(row["partials"] for row in derivations)
    sizes = "; ".join(row["sizes"] for row in derivations)
    yield "derivation proved", f"{partials} partial derivatives at {sizes}" if derivations else NOT_MEASURED
    for row in certificate["proved"]:
        yield "proved", f"{row['statement']} ({row.get('bound', 'all')})"
    for method, figures in certificate["gradcheck"].items():
        worst = f", worst {figures['worst_relative']:.1e}" if "worst_relative" in figures else ""
        yield "gradient checked", f"{method}: {figures['cases']} cases{worst}"
    for dtype, figures in certificate["error"].items():
        if "worst_roundings" in figures:
            bound = f"(bound {figures['bound']:g}), {figures['least_sqnr_db']:g} dB"
            yield f"error in {dtype}", f"{figures['worst_roundings']:.2f} roundings {bound}"
        else:
            yield "error", f"{dtype}: {figures['worst_relative']:.1e}"
    properties = certificate["properties"]
    yield "properties", f"{properties['count']} held in {properties['cases']} cases"
    refused = certificate["wrong_backwards_refused"]
    yield "wrong backwards", f"{refused} planted, all refused" if refused else "none planted"
    mutants, covered = certificate["mutants"], certificate["coverage"]
    if mutants != NOT_MEASURED:
        mutants = f"{mutants['killed']} killed, {mutants['survived']} survived ({mutants['score']:g} %)"
    if covered != NOT_MEASURED:
        covered = f"{covered['line']:g} % of lines, {covered['branch']:g} % of branches"
    yield "mutants", mutants
    yield "coverage", covered

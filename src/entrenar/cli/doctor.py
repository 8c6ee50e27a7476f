"""`entrenar doctor`: show the machine and the install, and check that gradients are right on them.

With RUN it looks at a run's folder instead (`examination.py`). With `--numerics --config FILE` it compares all ways in
which a run of that config may compute its gradient.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar import ops
from entrenar.cli import flags
from entrenar.errors import ConfigError, EntrenarError, GateFailed, NotMeasured
from entrenar.version import __version__

if TYPE_CHECKING:
    from entrenar.recipe.gradient_checks import GradientCheck
    from entrenar.recipe.numerics import Numerics

_EXTRAS = {
    "pyarrow": "parquet sources",
    "gguf": "GGUF files",
    "tensorboard": "TensorBoard logs",
    "matplotlib": "plots",
    "trackio": "trackers = trackio",
    "wandb": "trackers = wandb (Weights & Biases)",
    "mlflow": "trackers = mlflow",
}
_LEAST_DISK_BYTES = 2 * 10**9


def run(words: Sequence[str]) -> int:
    """Print the report; return 0 if all is well, 2 if a run has no whole checkpoint, 3 if the machine lacks something.

    Raises:
        GateFailed: a gradient is wrong.
        NotMeasured: a comparison that was asked for could not be made.
    """
    arguments = flags.parser(
        "doctor",
        "Check the machine and the install, and that gradients are right on them; or say what happened to a run,\n"
        "which checkpoints are whole, and what to do next.\n\n"
        "  entrenar doctor\n"
        "  entrenar doctor runs/first",
    )
    arguments.add_argument("run", nargs="?", metavar="RUN", help="a run to look at: a path, or a name in --runs-dir")
    arguments.add_argument(
        "--numerics", action="store_true", help="compare all ways of computing a gradient, on --config"
    )
    arguments.add_argument("--compiled", action="store_true", help="numerics: also through torch.compile")
    arguments.add_argument("--json", action="store_true", help="RUN or numerics: print JSON")
    flags.add_config_flags(arguments)
    parsed = flags.parse(arguments, words)
    if parsed.run is not None:
        return _examine(parsed)
    if parsed.numerics:
        return _numerics(parsed)
    if parsed.json or parsed.compiled or flags.given_flags(parsed) or parsed.config:
        raise ConfigError("--config, its flags, --compiled and --json belong to --numerics; add it, or leave them out")
    from entrenar.recipe.gradient_checks import gradient_checks  # noqa: PLC0415  # loads torch

    _print_rows("machine", _machine())
    _print_rows("install", _install())
    failed = _print_checks("gradients", gradient_checks())
    if failed:
        raise GateFailed(f"{', '.join(failed)}: do not train with this install; reinstall from constraints.txt")
    if shutil.disk_usage(Path.cwd()).free < _LEAST_DISK_BYTES:
        print("\nlittle disk space left here: a checkpoint may not fit")
        return 3
    print("\nall well")
    return 0


def _examine(parsed: argparse.Namespace) -> int:
    """Look at a run.

    Raises:
        ConfigError: a flag that has nothing to do with a run's folder.
        DataError: there is no such run.
    """
    given = flags.given_flags(parsed)
    if parsed.numerics or parsed.compiled or parsed.config or given.keys() - {"runs_dir"}:
        raise ConfigError("with RUN only --runs-dir and --json have an effect; leave the other flags out")
    from entrenar.cli import examination  # noqa: PLC0415  # not needed for the machine
    from entrenar.report.overview import find_run  # noqa: PLC0415

    return examination.show(find_run(Path(given.get("runs_dir", "runs")), parsed.run), as_json=parsed.json)


def _numerics(parsed: argparse.Namespace) -> int:
    """Compare the ways of a config; return 0 if all give the same gradient.

    Raises:
        GateFailed: a way gives another gradient.
        NotMeasured: a way could not be measured here; `compiled` only counts with --compiled.
    """
    from entrenar.recipe import Observer  # noqa: PLC0415  # loads torch
    from entrenar.recipe.numerics import compare_ways  # noqa: PLC0415

    stage = Observer() if parsed.json else Observer(on_stage=lambda name: print(f"  … {name}", file=sys.stderr))
    found = compare_ways(flags.config_of(parsed), with_compiler=parsed.compiled, observer=stage)
    if parsed.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print(*_numerics_table(found), sep="\n")
    differing = [f"{finding.way} (most in {finding.worst})" for finding in found.findings if finding.is_same is False]
    if differing:
        raise GateFailed(f"gradients differ: {'; '.join(differing)}; do not train in these ways with this install")
    missing = [
        f"{finding.way}: {finding.note}"
        for finding in found.findings
        if finding.is_same is None and (parsed.compiled or finding.way != "compiled")
    ]
    if missing:
        raise NotMeasured(f"{'; '.join(missing)}; every other way gives the same gradient")
    return 0


def _numerics_table(found: "Numerics") -> Iterator[str]:
    yield f"{found.parameters:,} parameters in {found.precision}, products in {found.compute_dtype}"
    yield f"{found.rows} rows of {found.seq_len} tokens; the plain way is {found.rounding:.1e} off from float64"
    yield ""
    yield f"{'':<7}{'way':<42} {'in float64':>10}  in {found.precision}"
    for finding in found.findings:
        if finding.float64 is None or finding.own is None:
            yield f"{'-':<7}{finding.way:<42} {finding.note}"
            continue
        own = "same bits" if finding.same_bits else f"{finding.own:.1e}"
        yield f"{'same' if finding.is_same else 'OTHER':<7}{finding.way:<42} {finding.float64:>10.1e}  {own}"


def _print_rows(title: str, rows: Iterator[tuple[str, str]]) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<22} {value}")


def _machine() -> Iterator[tuple[str, str]]:
    import torch  # noqa: PLC0415  # seconds, which neither --help nor a usage error needs

    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cores", f"{len(os.sched_getaffinity(0))} for this process, {torch.get_num_threads()} threads in torch"
    yield "vector instructions", torch.backends.cpu.get_cpu_capability()
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    yield "disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "GPU", ", ".join(names) or "none: everything works on the CPU"
    fastest = ops.fastest_compute_dtype(torch.bfloat16, torch.device("cpu"))
    yield "bfloat16 products", f"fastest in {str(fastest).removeprefix('torch.')} on this CPU (measured now)"


def _install() -> Iterator[tuple[str, str]]:
    yield "entrenar", __version__
    yield "Python", platform.python_version()
    for package in ("torch", "numpy", "tokenizers", "safetensors"):
        yield package, importlib.metadata.version(package)
    for package, purpose in _EXTRAS.items():
        has = importlib.util.find_spec(package) is not None
        yield package, importlib.metadata.version(package) if has else f"not installed: no {purpose}"


def _print_checks(title: str, checks: "Iterator[GradientCheck]") -> list[str]:
    """Run each check, print its largest relative error, and return the names of the checks that failed."""
    print(f"\n{title} (largest relative difference in float64)")
    failed = []
    for check in checks:
        try:
            error = check.measure()
            verdict = "ok" if error < check.tolerance else "WRONG"
            shown = f"{error:.1e}  (below {check.tolerance:.0e})"
        except EntrenarError as problem:
            verdict, shown = "WRONG", str(problem)
        if verdict != "ok":
            failed.append(check.name)
        print(f"  {verdict:<6} {check.name:<42} {shown}")
    return failed

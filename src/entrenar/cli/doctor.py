"""`entrenar doctor`: what this machine has, what is installed, and whether gradients come out right here.

With `--numerics --config FILE` it compares, on that config and its data, every way a run may compute its gradient.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from entrenar import __version__, ops
from entrenar.cli import flags
from entrenar.errors import ConfigError, EntrenarError, GateFailed
from entrenar.model import Llama, LlamaConfig
from entrenar.recipe import Observer
from entrenar.recipe.numerics import Numerics, compare_ways

_EXTRAS = {
    "pyarrow": "parquet sources",
    "gguf": "GGUF files",
    "tensorboard": "TensorBoard logs",
    "matplotlib": "plots",
}
_LEAST_DISK_BYTES = 2 * 10**9
# Equal sums in another order differ by rounding; a finite difference also by its step.
_ROUNDING, _STENCIL = 1e-12, 1e-6


def run(words: Sequence[str]) -> int:
    """Print the report; return 0 if all is well, 1 if a gradient is wrong, 3 if the machine lacks something."""
    arguments = flags.parser("doctor", "Check the machine, the install, and that gradients are right on them.")
    arguments.add_argument("--numerics", action="store_true", help="compare every way to the gradient, on --config")
    arguments.add_argument("--compiled", action="store_true", help="numerics: also through torch.compile")
    arguments.add_argument("--json", action="store_true", help="numerics: print JSON")
    flags.add_config_flags(arguments)
    parsed = flags.parse(arguments, words)
    if parsed.numerics:
        return _numerics(parsed)
    if parsed.json or parsed.compiled or flags.given_flags(parsed) or parsed.config:
        raise ConfigError("--config, its flags, --compiled and --json belong to --numerics; add it, or leave them out")
    _print_rows("machine", _machine())
    _print_rows("install", _install())
    failed = _print_checks("gradients", _gradient_checks())
    if failed:
        raise GateFailed(f"{', '.join(failed)}: do not train with this install; reinstall from constraints.txt")
    if shutil.disk_usage(Path.cwd()).free < _LEAST_DISK_BYTES:
        print("\nlittle disk left here: a checkpoint may not fit")
        return 3
    print("\nall well")
    return 0


def _numerics(parsed: argparse.Namespace) -> int:
    """Compare the ways of a config; return 0 if all give the same gradient."""
    stage = Observer() if parsed.json else Observer(on_stage=lambda name: print(f"  … {name}", file=sys.stderr))
    found = compare_ways(flags.config_of(parsed), with_compiler=parsed.compiled, observer=stage)
    if parsed.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print(*_numerics_table(found), sep="\n")
    differing = [f"{finding.way} (most in {finding.worst})" for finding in found.findings if finding.is_same is False]
    if differing:
        raise GateFailed(f"another gradient: {'; '.join(differing)}; do not train in these ways with this install")
    return 0


def _numerics_table(found: Numerics) -> Iterator[str]:
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


def _print_checks(title: str, checks: Iterator[tuple[str, float, Callable[[], float]]]) -> list[str]:
    """Run each check, print its largest relative error, and return the names of those that failed."""
    print(f"\n{title} (largest relative difference in float64)")
    failed = []
    for name, tolerance, check in checks:
        try:
            error = check()
            verdict = "ok" if error < tolerance else "WRONG"
            shown = f"{error:.1e}  (below {tolerance:.0e})"
        except EntrenarError as problem:
            verdict, shown = "WRONG", str(problem)
        if verdict != "ok":
            failed.append(name)
        print(f"  {verdict:<6} {name:<42} {shown}")
    return failed


def _gradient_checks() -> Iterator[tuple[str, float, Callable[[], float]]]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=32
    )
    model = Llama(config).double()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    ids = torch.randint(0, 64, (4, 16), generator=generator)
    targets = torch.randint(0, 64, (4, 16), generator=generator)
    targets[0, :5] = -100
    documents = (((0, 7), (7, 16)),) * 4
    whole = _gradient(model, [(ids, targets, None)])
    packed = _gradient(model, [(ids, targets, documents)])

    def split() -> float:
        return _distance(
            whole, _gradient(model, [(ids[row : row + 1], targets[row : row + 1], None) for row in range(4)])
        )

    def checkpointed() -> float:
        model.checkpointing = "full"
        try:
            return _distance(whole, _gradient(model, [(ids, targets, None)]))
        finally:
            model.checkpointing = "none"

    def unpacked() -> float:
        parts = [(ids[:, :7], targets[:, :7], None), (ids[:, 7:], targets[:, 7:], None)]
        return _distance(packed, _gradient(model, parts))

    yield "micro-batches = whole batch", _ROUNDING, split
    yield "activation checkpointing = none", _ROUNDING, checkpointed
    yield "packed documents = each alone", _ROUNDING, unpacked
    yield "derived backward = finite differences", _STENCIL, lambda: _finite_difference(model, ids, targets, whole)


Piece = tuple[torch.Tensor, torch.Tensor, ops.DocumentSpans | None]


def _gradient(model: Llama, pieces: Sequence[Piece]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    for ids, targets, documents in pieces:
        model.loss(ids, targets, documents=documents).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _finite_difference(model: Llama, ids: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return how far the directional derivative by a five-point stencil is from the gradient's."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    parameters = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    step = 1e-4

    def loss_at(offset: float) -> float:
        torch.nn.utils.vector_to_parameters(start + offset * direction, parameters)
        with torch.no_grad():
            return float(model.loss(ids, targets))

    slope = (loss_at(-2 * step) - 8 * loss_at(-step) + 8 * loss_at(step) - loss_at(2 * step)) / (12 * step)
    torch.nn.utils.vector_to_parameters(start, parameters)
    exact = float(gradient @ direction)
    return abs(slope - exact) / abs(exact)

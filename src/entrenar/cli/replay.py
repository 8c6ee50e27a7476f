"""`entrenar replay RUN/replay/FILE`: take the step again whose alarm stopped the run, and compare the bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar.cli import flags
from entrenar.errors import GateFailed

if TYPE_CHECKING:
    from entrenar.recipe.replay import Replay

_LAYERS_SHOWN = 8


def run(words: Sequence[str]) -> int:
    """Replay; return 0 if every bit is the same.

    Raises:
        GateFailed: the figures differ.
    """
    arguments = flags.parser(
        "replay",
        "Take a step again whose alarm stopped a run: same checkpoint, same batches, same code. Same bits mean that\n"
        "the cause is in the data or the arithmetic; other bits, that the machine or something since has changed.\n\n"
        "  entrenar replay runs/first/replay/step-00000120.json",
    )
    arguments.add_argument("bundle", type=Path, help="a file in RUN/replay")
    parsed = flags.parse(arguments, words)
    from entrenar.recipe.replay import replay  # noqa: PLC0415  # loads torch

    found = replay(parsed.bundle)
    print("\n".join(_lines(found)))
    if found.differing:
        raise GateFailed(f"{len(found.differing)} of {len(found.figures)} figures differ; {_suspicion(found)}")
    print("\nEvery bit is the same: the cause is in the data or the arithmetic, not in this machine.")
    return 0


def _lines(found: "Replay") -> list[str]:
    bundle = found.bundle
    names = sorted(found.figures, key=lambda name: (name not in ("loss", "gradient norm"), name not in found.differing))
    shown = names[: 2 + _LAYERS_SHOWN]
    width = max(len(name) for name in shown)
    then = "before the first step" if bundle.checkpoint is None else f"from {bundle.checkpoint}"
    lines = [
        f"step {bundle.step}, {then}",
        f"  alarm: {bundle.alarm}",
        f"  batches: {'the same' if found.are_batches_same else 'NOT the same: the data have changed'}",
    ]
    for name in shown:
        verdict = "OTHER BITS" if name in found.differing else "same bits"
        recorded = bundle.figures.get(name, float("nan"))
        lines.append(f"  {name:<{width}}  then {recorded:.9g}  now {found.figures[name]:.9g}  {verdict}")
    if len(names) > len(shown):
        lines.append(f"  and {len(names) - len(shown)} more layers")
    lines += [f"  {name} was {was!r} and is {now!r} now" for name, was, now in found.machine_changes]
    return lines


def _suspicion(found: "Replay") -> str:
    if not found.are_batches_same:
        return "the data of the step have changed since"
    if found.machine_changes:
        names = ", ".join(name.replace("_", " ") for name, _, _ in found.machine_changes)
        return f"{names} changed since, which can change bits"
    return "data, torch and threads are the same: suspect memory or processor, and run it once more"

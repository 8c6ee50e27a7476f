"""Draw the score over commits, with the grades as lines."""

import importlib
import io
from collections.abc import Sequence
from pathlib import Path

from entrenar.errors import MachineError, NotMeasured
from entrenar.files import atomic_write
from entrenar.quality.debt import formula
from entrenar.quality.history.points import Point

_MARGIN = 2.0  # points above and below the drawn scores


def draw(found: Sequence[Point], title: str, place: Path) -> None:
    """Write a picture of the scores, in the format that the file's ending names.

    Raises: NotMeasured if no commit has a score; MachineError if matplotlib is missing.
    """
    rows = [(number, point.tree.score) for number, point in enumerate(found) if point.tree.score is not None]
    if not rows:
        raise NotMeasured("no commit has a score; there is nothing to draw")
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4.5), layout="constrained")
    except ModuleNotFoundError as missing:
        raise MachineError("--plot needs matplotlib, which is missing; pip install 'entrenar[plots]'") from missing
    axes = figure.subplots()
    low, high = min(value for _, value in rows) - _MARGIN, min(100.0, max(value for _, value in rows) + _MARGIN)
    for name, least in formula.GRADES:
        if low <= least <= high:
            axes.axhline(least, color="0.8", linewidth=1)
            axes.annotate(name, (1.0, least), xycoords=("axes fraction", "data"), va="center", color="0.4")
    axes.plot(*zip(*rows, strict=True), marker=".", color="tab:blue")
    for number, point in enumerate(found):
        if point.name is not None and point.tree.score is not None:
            axes.annotate(point.name, (number, point.tree.score), rotation=45, fontsize="small")
    ends = {number: found[number].commit for number in (0, len(found) - 1)}
    labels = [f"{commit.hash[:8]}\n{commit.date[:10]}" for commit in ends.values()]
    axes.set(ylim=(low, high), ylabel="score", title=title, xticks=list(ends), xticklabels=labels)
    picture = io.BytesIO()
    figure.savefig(picture, format=place.suffix.lstrip(".") or "png")
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(place, picture.getvalue())

"""A run in a few lines of HTML, for a notebook: no script, no style sheet, colors of the page around it.

Whatever comes from a run is escaped.
"""

from collections.abc import Iterator, Sequence
from html import escape

from entrenar.report.history import thinned
from entrenar.report.sight import Sight
from entrenar.report.step_line import event_line, step_line

_WIDTH, _HEIGHT, _POINTS = 640, 140, 320


def card(sight: Sight, stage: str = "") -> str:
    """Return the current state of a run; `stage` says what it is doing."""
    return f'<div style="max-width:{_WIDTH}px">{"".join(_parts(sight, stage))}</div>'


def plain(sight: Sight, stage: str = "") -> str:
    """Return the same in one line of text, for a front end without HTML."""
    shown = stage if sight.last is None else step_line(sight.last, sight.held_out, None)
    return f"{sight.name}: {shown or 'starting'}"


def _parts(sight: Sight, stage: str) -> Iterator[str]:
    yield f"<b>{escape(sight.name)}</b> {escape(stage)}"
    if sight.last is not None:
        if sight.is_running and (share := sight.share_done) is not None:
            yield f'<progress style="width:100%" max="1" value="{share:.4f}"></progress>'
        yield f"<div><code>{escape(step_line(sight.last, sight.held_out, None))}</code></div>"
    if len(sight.losses) > 1:
        yield _chart(sight)
    yield from (f"<div><small>{escape(event_line(event))}</small></div>" for event in sight.events)


def _chart(sight: Sight) -> str:
    """Draw the loss of each step as a thin line, and the held-out loss as a thick one."""
    steps = [(float(index), sight.losses[index]) for index in thinned(sight.losses, _POINTS)]
    held_out = [(float(index), loss) for index, loss in sight.held_out_losses]
    values = [loss for _, loss in (*steps, *held_out)]
    low, high = min(values), max(values)
    line = _Scale(low, (high - low) or 1.0, float(len(sight.losses) - 1)).line
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="width:100%" role="img" '
        f'aria-label="loss from {sight.losses[0]:.3f} to {sight.losses[-1]:.3f}">'
        f"{line(steps, 1)}{line(held_out, 3)}"
        f'<text x="4" y="14" font-size="12" fill="currentColor">{high:.3f}</text>'
        f'<text x="4" y="{_HEIGHT - 4}" font-size="12" fill="currentColor">{low:.3f}</text></svg>'
    )


class _Scale:
    """Places losses on the chart."""

    def __init__(self, low: float, spread: float, last: float) -> None:
        self._low, self._spread, self._last = low, spread, last

    def line(self, points: Sequence[tuple[float, float]], thickness: int) -> str:
        """Return a line through the points."""
        places = " ".join(
            f"{_WIDTH * x / self._last:.1f},{_HEIGHT * (1 - (y - self._low) / self._spread):.1f}" for x, y in points
        )
        return f'<polyline points="{places}" fill="none" stroke="currentColor" stroke-width="{thickness}"/>'

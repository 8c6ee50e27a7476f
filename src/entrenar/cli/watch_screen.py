"""A run on a terminal: a few lines, rewritten in place, as wide as the terminal is."""

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from entrenar.report.sight import Sight
from entrenar.report.step_line import duration, event_line, printable, quantity
from entrenar.runs import StepRecord

_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS = " _.-=+*%#"
_WIDEST = 100
_PHASES_SHOWN = 4


class LiveScreen:
    """Rewrites what it shows."""

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def show(self, sight: Sight) -> None:
        """Show the current state of a run."""
        self._live.update(Picture(sight), refresh=True)

    def close(self) -> None:
        """Leave the last picture in place."""
        self._live.stop()


class Picture:
    """Draws a run for rich."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines, each cut to the width there is."""
        width = min(options.max_width, _WIDEST)
        yield _cut(self._headline(), width)
        if self._sight.last is None:
            yield _cut(Text("no step is recorded yet", style="dim"), width)
        else:
            if (share := self._sight.share_done) is not None:
                yield ProgressBar(total=1.0, completed=share, width=width)
                yield Segment.line()
            bars = _PLAIN_BARS if options.ascii_only else _BARS
            for line in (*self._figures(self._sight.last), loss_line(self._sight.losses, width, bars), self._phases()):
                yield _cut(Text(line), width)
        for event in self._sight.events:
            yield _cut(Text(event_line(event), style="yellow"), width)

    def _headline(self) -> Text:
        state = ("runs now", "bold green") if self._sight.is_running else ("not running", "bold")
        return Text.assemble((printable(self._sight.name), "bold cyan"), "  ", state)

    def _figures(self, last: StepRecord) -> list[str]:
        sight = self._sight
        left = "" if last.eta_s is None else f", {duration(last.eta_s)} left"
        lines = [
            f"step {last.step:,}  {duration(last.elapsed_s)}{left}",
            f"loss {sight.mean_loss:.4f}  {quantity(last.targets_per_s)} tokens/s",
            f"rate {last.lr:.1e}  gradient norm {last.grad_norm:.3g}",
        ]
        if sight.held_out is not None and sight.best is not None and sight.best.held_out is not None:
            best = f"best {sight.best.held_out['loss']:.4f} at step {sight.best.step:,}"
            lines.insert(2, f"held-out {sight.held_out['loss']:.4f}  {best}")
        return lines

    def _phases(self) -> str:
        total = math.fsum(self._sight.phases_s.values())
        largest = sorted(self._sight.phases_s.items(), key=lambda item: -item[1])[:_PHASES_SHOWN]
        return "  ".join(f"{printable(name)} {seconds / total:.0%}" for name, seconds in largest) if total else ""


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line


def loss_line(losses: Sequence[float], width: int, bars: str) -> str:
    """Return the losses as one line, on a logarithmic scale: the first fall would flatten the rest."""
    return sparkline([math.log(loss) for loss in losses if loss > 0], width, bars)


def sparkline(values: Sequence[float], width: int, bars: str) -> str:
    """Return the values as one line of bars, each the mean of an equal stretch; the lowest is the lowest bar."""
    count = min(width, len(values))
    means = []
    for number in range(count):
        stretch = values[number * len(values) // count : (number + 1) * len(values) // count]
        means.append(math.fsum(stretch) / len(stretch))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 2) / (high - low) if high > low else 0.0
    return "".join(bars[1 + round((mean - low) * scale)] for mean in means)

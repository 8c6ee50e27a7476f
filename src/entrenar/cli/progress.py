"""Show progress: one live line on a terminal, plain lines in a file or pipe."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from entrenar.report.step_line import duration, event_line, quantity, step_line
from entrenar.runs import Event, StepRecord

if TYPE_CHECKING:
    from entrenar.data import Progress
    from entrenar.recipe import Observer
    from entrenar.train import Outcome

_LIVE_EVERY_S = 0.2
_PLAIN_EVERY_S = 10.0
_BARS, _WIDEST = (30, 8), 100  # the bar stands at the right end, so that it keeps its place while the text changes

_ENDS = {
    "steps": "trained to the planned end",
    "time": "the time limit was reached",
    "early_stop": "the held-out loss stopped falling",
    "data": "the data ended",
}


def conclusion(outcome: "Outcome") -> str:
    """Describe in one line how a run ended."""
    last = outcome.last_record
    if last is None:
        return (
            f"[entrenar: Nothing to train] the run is at step {outcome.step} already: {_ENDS[outcome.reason]}; "
            "raise --max-steps or --epochs, or give --max-time-s, to train on"
        )
    after = f"{outcome.step:,} step{'' if outcome.step == 1 else 's'} after {duration(last.elapsed_s)}"
    if outcome.reason == "signal":
        return f"[entrenar: Training interrupted] {after}: stopped by a signal"
    return f"[entrenar: Training complete!] {after}: {_ENDS[outcome.reason]}"


class Line:
    """A line that is rewritten on a terminal; elsewhere a new line every few seconds."""

    def __init__(self) -> None:
        self._is_live = sys.stdout.isatty()
        self._every_s = _LIVE_EVERY_S if self._is_live else _PLAIN_EVERY_S
        self._shown = float("-inf")
        self._width = 0
        self._console = Console(file=sys.stdout)

    @property
    def room(self) -> int | None:
        """The columns that a rewritten line may take without wrapping; None where lines are not rewritten."""
        return max(shutil.get_terminal_size().columns - 1, 1) if self._is_live else None

    def show(self, text: str, *, share: float | None = None, is_forced: bool = False) -> None:
        """Replace the line with `text`, if it is time to; a terminal with room shows the `share` that is done."""
        now = time.monotonic()
        if now - self._shown < self._every_s and not is_forced:
            return
        self._shown = now
        if self._is_live:
            self._rewrite(text, share)
        else:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _rewrite(self, text: str, share: float | None) -> None:
        room = self.room or 0
        line = Text(text[:room])
        right = min(room, _WIDEST)
        cells = next((cells for cells in _BARS if len(line) + 2 + cells <= right), 0)
        if share is not None and cells:
            done, open_ = ("=", "-") if self._console.options.ascii_only else ("━", "─")
            full = round(min(share, 1.0) * cells)
            line.pad_right(right - cells - len(line))
            line.append(done * full, "green").append(open_ * (cells - full), "bright_black")
        width = len(line)
        line.pad_right(max(min(self._width, room) - width, 0))
        self._width = width
        sys.stdout.write("\r")
        self._console.print(line, end="", soft_wrap=True)

    def note(self, text: str) -> None:
        """Print `text` on a separate line."""
        if self._is_live and self._width:
            sys.stdout.write("\r" + " " * self._width + "\r")
            self._width = 0
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._shown = float("-inf")


class TrainingView:
    """Shows a run: step, loss, held-out loss, tokens/s, time left."""

    def __init__(self, epochs: float | None, *, is_compiled: bool = False) -> None:
        self._line = Line()
        self._is_compiled = is_compiled
        self._epochs = epochs
        self._held_out: Mapping[str, float] | None = None
        self._epoch: int | None = None

    def observer(self) -> "Observer":
        """Return the callbacks for a recipe."""
        from entrenar.cli.spans import trace_layers  # noqa: PLC0415  # loads torch
        from entrenar.recipe import Observer  # noqa: PLC0415

        on_model = partial(trace_layers, is_compiled=self._is_compiled)
        return Observer(self.stage, self.record, self.event, self.preparing, on_model=on_model)

    def stage(self, text: str) -> None:
        """Announce a stage."""
        self._line.note(text)

    def preparing(self, progress: "Progress") -> None:
        """Show the progress of `prepare`."""
        share = progress.bytes_read / max(progress.total_bytes, 1)
        counts = f"{quantity(progress.documents)} documents  {quantity(progress.tokens)} tokens"
        self._line.show(f"{progress.stage}: {share:4.0%}  {counts}", share=share)

    def record(self, record: StepRecord) -> None:
        """Show a step."""
        self._held_out = record.held_out or self._held_out
        line = step_line(record, self._held_out, self._line.room)
        total_s = math.nan if record.eta_s is None else record.elapsed_s + record.eta_s
        share = record.elapsed_s / total_s if total_s > 0 else None
        self._line.show(line, share=share, is_forced=record.held_out is not None)
        self._conclude_epoch(record)

    def _conclude_epoch(self, record: StepRecord) -> None:
        if self._epochs is None or record.epoch is None:
            return
        # The current epoch: a resumed run does not report earlier ones a second time.
        self._epoch = self._epoch or math.ceil(record.epoch)
        if record.epoch < self._epoch:
            return
        self._line.note(f"[entrenar: Epoch {math.floor(record.epoch)}/{self._epochs:g}, Loss: {record.loss:.3f}]")
        self._line.note(f"[entrenar: Backward pass: {record.phases_s.get('backward', 0) * 1e3:.0f}ms]")
        self._line.note(f"[entrenar: Optimizer step: {record.phases_s.get('optimizer', 0) * 1e3:.0f}ms]")
        self._epoch = math.floor(record.epoch) + 1

    def event(self, event: Event) -> None:
        """Show an event."""
        self._line.note(event_line(event))

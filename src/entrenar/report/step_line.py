"""A step in one line, however narrow the terminal is. Nothing here loads torch."""

from collections.abc import Mapping

from entrenar.runs import Event, StepRecord


def duration(seconds: float) -> str:
    """Return seconds as a person would write them: 42s, 3m10s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def quantity(count: float) -> str:
    """Return a count with a unit: 950, 12.3k, 4.5M."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if count < limit:
            return f"{count / divisor:.0f}{unit}" if divisor == 1 else f"{count / divisor:.1f}{unit}"
    return f"{count / 1e9:.1f}G"


def step_line(record: StepRecord, held_out: Mapping[str, float] | None, width: int | None) -> str:
    """Return a step in one line of at most `width` columns; None is as wide as it takes.

    Where it is narrow, digits and words go first, then tokens/s, then the held-out loss; step, loss and time left stay.
    """
    left = None if record.eta_s is None else duration(record.eta_s)
    known = None if held_out is None else held_out["loss"]
    rate = quantity(record.targets_per_s)
    wide = [
        f"step {record.step}", f"loss {record.loss:.4f}", "" if known is None else f"held-out {known:.4f}",
        f"{rate} tokens/s", "" if left is None else f"{left} left",
    ]  # fmt: skip
    short = [
        wide[0], f"loss {record.loss:.3f}", "" if known is None else f"held {known:.3f}", f"{rate}/s", wide[4],
    ]  # fmt: skip
    narrow = [f"{record.step}", *short[1:4], "" if left is None else f"-{left}"]
    trials = (wide, short, narrow, [*narrow[:3], narrow[4]], [*narrow[:2], narrow[4]])
    lines = ["  ".join(part for part in parts if part) for parts in trials]
    fitting = [line for line in lines if width is None or len(line) <= width]
    return fitting[0] if fitting else lines[-1][:width]


def event_line(event: Event) -> str:
    """Return an event as one line."""
    return printable(f"step {event.step}: {event.kind.replace('_', ' ')}: {event.message}")


def printable(text: str) -> str:
    """Return text on one line, without the characters that move a cursor or change a color."""
    return "".join(letter if letter.isprintable() else " " for letter in text)

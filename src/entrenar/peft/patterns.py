"""Match the patterns of an adapter's config, which a stranger wrote, within a limit of CPU time.

A pattern such as `(([a-z._0-9])+)+!` takes longer with each letter than the machine will last. CPU time is what counts,
so a busy machine makes no pattern fail. Python lets a signal interrupt a match, but only in the main thread; in another
one there is no limit.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from entrenar.errors import ConfigError

MAX_CPU_S = 2.0


class _TooLongError(Exception):
    """The CPU time is used up."""


def matches(pattern: str, module_name: str) -> bool:
    """Return whether a pattern matches the end of a module's name by whole parts (PEFT's rule).

    Raises: ConfigError for a pattern that takes too long.
    """
    try:
        with _limited(MAX_CPU_S):
            return re.match(rf"(.*\.)?({pattern})$", module_name) is not None
    except _TooLongError:
        raise ConfigError(
            f"the pattern {pattern!r} takes more than {MAX_CPU_S:g} s to match {module_name}; write it without one "
            "repetition inside of another"
        ) from None


@contextmanager
def _limited(cpu_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

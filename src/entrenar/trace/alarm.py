"""Act on a High anomaly: run a command, or ask the traced program to stop.

An alarm must not slow down the tracer and must not fire a thousand times for one broken disk: it starts a process and
does not wait for it, and it stays quiet for a while after it fired.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from entrenar.errors import ConfigError
from entrenar.trace.anomaly_report import anomaly_json, line
from entrenar.trace.records import Anomaly

QUIET_S = 60.0
_log = logging.getLogger(__name__)


class Alarm:
    """Call `action` for a High anomaly, then stay quiet for `quiet_s`. `fired` counts calls, `silenced` the rest."""

    def __init__(
        self,
        action: Callable[[Anomaly], None],
        *,
        quiet_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._action = action
        self._quiet_s = quiet_s
        self._clock = clock
        self._quiet_until = float("-inf")
        self.fired = 0
        self.silenced = 0

    def __call__(self, anomaly: Anomaly) -> None:
        """Fire, unless the alarm fired a moment ago. A failing action is logged: it must not end the trace."""
        now = self._clock()
        if now < self._quiet_until:
            self.silenced += 1
            return
        self._quiet_until = now + self._quiet_s
        self.fired += 1
        try:
            self._action(anomaly)
        except OSError as error:
            _log.warning("the alarm for %r failed: %s", line(anomaly), error)


def run_command(command: str) -> Callable[[Anomaly], None]:
    """Return an action that starts `command` with the anomaly as one line of JSON on its standard input.

    Raises: ConfigError for an empty command or unbalanced quotes.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"the command of an alarm must be a shell-like list of words, got {command!r}: {error}"
        ) from error
    if not words:
        raise ConfigError("the command of an alarm must not be empty; name a program to run")

    def start(anomaly: Anomaly) -> None:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # Somebody must collect the exit of the command, and it must not be the tracer, which has no time to wait.
        data = json.dumps(anomaly_json(anomaly)).encode() + b"\n"
        threading.Thread(target=process.communicate, args=(data,), daemon=True).start()

    return start


def stop_process(pid: int) -> Callable[[Anomaly], None]:
    """Return an action that sends SIGTERM: `entrenar train` then writes a checkpoint and ends."""

    def stop(anomaly: Anomaly) -> None:
        _log.warning("stopping process %d: %s", pid, line(anomaly))
        os.kill(pid, signal.SIGTERM)

    return stop

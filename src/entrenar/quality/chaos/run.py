"""Run a command or a function in a child process under its conditions, and say how it ended."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from entrenar.errors import ConfigError
from entrenar.memory import status_bytes
from entrenar.quality.chaos import limits
from entrenar.quality.chaos.config import ChaosConfig
from entrenar.quality.chaos.outcome import Ending, Outcome

_PERIOD_S = 0.05
_MERCY_S = 2.0
_LINES_KEPT = 20
_TRACEBACK = "Traceback (most recent call last):"
_NOT_SET = "entrenar chaos: not set: "


@dataclass
class _Watch:
    """What is done to a child while it runs: signals, stops, the end of its time."""

    pid: int
    config: ChaosConfig
    sent: list[tuple[float, str]] = field(default_factory=list)
    has_timed_out: bool = False
    peak_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def begin(self) -> threading.Event:
        """Start; setting the event ends it."""
        over = threading.Event()
        threading.Thread(target=self._run, args=(over,), daemon=True).start()
        return over

    def _run(self, over: threading.Event) -> None:
        config, at = self.config, None
        if config.signal is not None:
            at = random.Random(config.seed).uniform(0, config.within_s)  # noqa: S311 - a moment, not a secret
        while not over.wait(0 if config.cpu_share else _PERIOD_S):
            elapsed = time.monotonic() - self.started
            self.peak_bytes = max(self.peak_bytes, status_bytes("VmHWM", self.pid))
            if at is not None and elapsed >= at:
                self._send(str(config.signal))
                at = None
            if config.timeout_s is not None and elapsed >= config.timeout_s:
                self._end(over)
                return
            if config.cpu_share is not None:
                self._throttle(config.cpu_share, over)

    def _throttle(self, share: float, over: threading.Event) -> None:
        over.wait(_PERIOD_S * share)
        self._kill("SIGSTOP")
        over.wait(_PERIOD_S * (1 - share))
        self._kill("SIGCONT")

    def _end(self, over: threading.Event) -> None:
        self.has_timed_out = True
        self._send("SIGTERM")
        if not over.wait(_MERCY_S):
            self._send("SIGKILL")

    def _send(self, name: str) -> None:
        self.sent.append((round(time.monotonic() - self.started, 3), name))
        self._kill(name)

    def _kill(self, name: str) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.Signals[name])


def run(config: ChaosConfig, command: Sequence[str], *, on_line: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run a command; `on_line` gets each line of its output, both streams together.

    Raises: ConfigError if the command cannot be started.
    """
    wrapped, missing = limits.with_strace(config, command)
    # The child limits itself before it becomes the command: a program between two would need Python's start-up twice.
    launcher = [sys.executable, "-c", _LAUNCHER, config.model_dump_json(exclude_unset=True), *wrapped]
    process = subprocess.Popen(
        launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    watch = _Watch(process.pid, config)
    over = watch.begin()
    tail: deque[str] = deque(maxlen=_LINES_KEPT)
    has_traceback = has_started = False
    for line in process.stdout or ():
        if line.startswith(_NOT_SET):
            missing.append(line.removeprefix(_NOT_SET).strip())
            continue
        if config.memory_bytes is not None and not has_started and (config.after or "") in line:
            has_started = True
            missing += _limit_memory(process.pid, config.memory_bytes)
        has_traceback |= line.startswith(_TRACEBACK)
        tail.append(line.rstrip("\n"))
        on_line(line)
    code = process.wait()
    over.set()
    if process.stdout is not None:
        process.stdout.close()
    if config.memory_bytes is not None and not has_started:
        missing.append("memory: the command ended before its start-up was over")
    if code == _NO_COMMAND and not has_traceback:
        raise ConfigError(f"the command cannot be started: {tail[-1] if tail else command[0]}")
    ending = _ending(code, watch, has_traceback=has_traceback)
    return Outcome(ending, code, None, "\n".join(tail), _since(watch), watch.peak_bytes, watch.sent, missing)


_NO_COMMAND = 127
_LAUNCHER = """
import json, os, sys
from entrenar.quality.chaos import ChaosConfig
from entrenar.quality.chaos.limits import limit_self
for missing in limit_self(ChaosConfig.of(json.loads(sys.argv[1]))):
    print("entrenar chaos: not set: " + missing, flush=True)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]}: {error.strerror}", flush=True)
    sys.exit(127)
"""


def _limit_memory(pid: int, added_bytes: int) -> list[str]:
    try:
        limits.limit_memory(pid, added_bytes)
    except (OSError, ValueError) as error:
        return [f"memory: the limit cannot be set ({error})"]
    return []


def run_function(config: ChaosConfig, work: Callable[[], object]) -> Outcome:
    """Run a function in a forked child; its memory is limited to what it has at that moment and `memory_bytes`.

    An error whose class has an `exit_code` is a clear refusal, and so is a MemoryError.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(config, work, writing)
    os.close(writing)
    watch = _Watch(child, config)
    over = watch.begin()
    with os.fdopen(reading, encoding="utf-8") as stream:
        told = _read(stream)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    missing = list(told.get("missing", []))
    missing += ["writes: slow and failing writes need a command"] if config.slow_write_s or config.fail_write else []
    ending = _ending(code, watch, has_traceback=bool(told.get("is_bug")))
    peak = max(watch.peak_bytes, int(told.get("peak_bytes", 0)))
    return Outcome(ending, code, told.get("error"), told.get("message", ""), _since(watch), peak, watch.sent, missing)


def _be_child(config: ChaosConfig, work: Callable[[], object], writing: int) -> None:
    """Do the work and tell how it ended; never returns."""
    code = 0
    told: dict[str, Any] = {}
    try:
        os.setsid()
        missing = limits.limit_self(config)
        if config.memory_bytes is not None:
            missing += _limit_memory(os.getpid(), config.memory_bytes)
        told["missing"] = missing
        work()
    except BaseException as error:  # noqa: BLE001 - the child must not return into its parent's program
        code = int(getattr(error, "exit_code", 3 if isinstance(error, MemoryError) else 1))
        is_typed = hasattr(error, "exit_code") or isinstance(error, MemoryError)
        told |= {"error": type(error).__name__, "message": str(error)[:2000], "is_bug": not is_typed}
    with suppress(BaseException):
        told["peak_bytes"] = status_bytes("VmHWM")
        os.write(writing, json.dumps(told).encode())
    os._exit(code)


def _read(stream: IO[str]) -> dict[str, Any]:
    try:
        told = json.loads(stream.read() or "{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _ending(code: int, watch: _Watch, *, has_traceback: bool) -> Ending:
    if watch.has_timed_out:
        return "timed_out"
    if has_traceback:
        return "crashed"
    if code >= 0:
        return "survived" if code == 0 else "refused"
    asked = {name for _, name in watch.sent} | ({"SIGXCPU", "SIGKILL"} if watch.config.cpu_s is not None else set())
    return "killed" if signal.Signals(-code).name in asked else "crashed"


def _since(watch: _Watch) -> float:
    return round(time.monotonic() - watch.started, 3)

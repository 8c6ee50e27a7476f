"""A High anomaly acts once, and does not slow or end the trace."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from entrenar.errors import ConfigError
from entrenar.trace.alarm import Alarm, run_command, stop_process
from entrenar.trace.records import Anomaly

HIGH = Anomaly("read", "point", 0, 5_234_000, 102_300, 6.3, "high")


def test_an_alarm_stays_quiet_for_a_while():
    """One broken disk is one alarm a minute, not a thousand; the rest are counted."""
    now = [0.0]
    calls = []
    alarm = Alarm(calls.append, quiet_s=60, clock=lambda: now[0])
    for now[0] in (0, 1, 59, 60, 61):
        alarm(HIGH)
    assert (len(calls), alarm.fired, alarm.silenced) == (2, 2, 3)


def test_a_command_gets_the_anomaly(tmp_path):
    """The command starts at once and reads one line of JSON."""
    out = tmp_path / "seen"
    code = f"import sys, pathlib; pathlib.Path({str(out)!r}).write_text(sys.stdin.read())"
    Alarm(run_command(f'{sys.executable} -c "{code}"'))(HIGH)
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    values = json.loads(out.read_text())
    assert (values["operation"], values["severity"], values["duration_us"]) == ("read", "high", 5234.0)


def test_a_command_that_cannot_start_is_logged_and_no_more(caplog):
    """The trace goes on."""
    Alarm(run_command("/no/such/program"))(HIGH)
    assert "the alarm for" in caplog.text


@pytest.mark.parametrize(("command", "message"), [("  ", "must not be empty"), ("a 'b", "No closing quotation")])
def test_a_senseless_command_is_refused(command, message):
    """Before the run starts, not when the disk breaks."""
    with pytest.raises(ConfigError, match=message):
        run_command(command)


def test_a_program_can_be_asked_to_stop():
    """It gets SIGTERM."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stop_process(sleeper.pid)(HIGH)
    assert sleeper.wait(timeout=30) == -signal.SIGTERM
    assert os.getpid() != sleeper.pid

"""`trace run --anomaly-realtime` names a slow call as it ends, with its line, and a High one acts."""

import json
import signal
import subprocess
import sys
import time

import pytest

from entrenar.errors import MachineError
from entrenar.trace import backends

# Takes a lock a hundred times; then another process holds it for a while, as a stuck disk or a peer would.
PROGRAM = """\
import fcntl, os, subprocess, sys, time
mine = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
def take_lock():
    fcntl.flock(mine, fcntl.LOCK_EX)
for _ in range(100):
    take_lock()
    fcntl.flock(mine, fcntl.LOCK_UN)
holder = subprocess.Popen([sys.executable, "-c", '''
import fcntl, os, sys, time
theirs = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(theirs, fcntl.LOCK_EX)
print("held", flush=True)
inode = f":{os.fstat(theirs).st_ino} "
for _ in range(6000):  # until the other process waits, however late a busy machine lets it
    if any("->" in line and inode in line for line in open("/proc/locks")):
        break
    time.sleep(0.01)
time.sleep(2)
''', sys.argv[1]], stdout=subprocess.PIPE)
holder.stdout.readline()
take_lock()
holder.wait()
print("done", flush=True)
time.sleep(float(sys.argv[2]))
"""


def can_trace():
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


pytestmark = pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")


@pytest.fixture
def run(tmp_path):
    """Run the program under the detector; flock alone is traced, so that nothing else is judged."""
    script = tmp_path / "locks.py"
    script.write_text(PROGRAM)

    def run(*flags: str, rest_s: float = 0.0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "entrenar", "trace", "run", "--anomaly-realtime", "-e", "trace=flock",
                   "--save", str(tmp_path / "t.sqlite"), *flags, "--",
                   sys.executable, "-S", str(script), str(tmp_path / "lock"), str(rest_s)]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    return run


def test_a_held_lock_is_named_with_its_line(run):
    """The line and the report of section 4.3; the program's own output and exit code are as without a tracer."""
    done = run("--anomaly-threshold", "3.0")
    assert (done.returncode, done.stdout) == (0, "done\n")
    slow = [line for line in done.stderr.splitlines() if line.startswith("⚠️ ANOMALY: flock took ")]
    assert any(line.endswith("- 🔴 High  [locks.py:4 in take_lock]") for line in slow)
    assert "=== Real-Time Anomaly Detection Report ===" in done.stderr


def test_a_high_anomaly_runs_a_command(run, tmp_path):
    """The command gets the anomaly as JSON on its standard input."""
    out = tmp_path / "alarm.json"
    code = f"import pathlib, sys; pathlib.Path({str(out)!r}).write_text(sys.stdin.read())"
    assert run("--on-high-anomaly", f'{sys.executable} -c "{code}"').returncode == 0
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    values = json.loads(out.read_text())
    assert (values["operation"], values["severity"]) == ("flock", "high")


def test_a_high_anomaly_can_stop_the_program(run):
    """With `stop` the program gets SIGTERM, and the tracer ends as the program did."""
    done = run("--on-high-anomaly", "stop", rest_s=60.0)
    assert done.returncode == -signal.SIGTERM
    assert "stopping process" in done.stderr

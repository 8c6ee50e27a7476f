"""`entrenar trace run` traces and never changes the program; `entrenar trace report` says what it saw."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from entrenar.cli.main import main
from entrenar.errors import MachineError
from entrenar.trace import backends
from entrenar.trace.reader import Reader

PROGRAM = """\
import os, sys, time
def load_checkpoint():
    time.sleep(1)
    os.close(os.open(sys.argv[0], os.O_RDONLY))
def small():
    for _ in range(20): os.getppid()
print(sys.stdin.read(), end='')
print('error', file=sys.stderr)
load_checkpoint()
small()
sys.exit(3)
"""


def can_trace():
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


needs_ptrace = pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")


@pytest.fixture
def run(tmp_path):
    """Run a small program under `trace run` with these flags; return the process and the trace file.

    Without `-S` the traced program measures its own coverage, 1,700 system calls of it, when these tests do.
    """
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)

    def go(*flags, command=(sys.executable, "-S", str(script)), stdin="input\n"):
        argv = [sys.executable, "-m", "entrenar", "trace", "run", "--save", str(tmp_path / "t.sqlite"), *flags, "--"]
        done = subprocess.run(
            [*argv, *command], input=stdin, capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        return done, tmp_path / "t.sqlite"

    return go


@needs_ptrace
def test_the_program_runs_as_without_a_tracer_and_its_hot_path_is_on_top(run):
    """Input, output, errors and exit code are its own; the slow function leads the table, with its line."""
    done, trace = run("--function-time", "--source", "-c", "--stats-extended", "-T", "--call-graph")
    assert done.returncode == 3
    assert done.stdout == "input\n"
    assert "error\n" in done.stderr
    top = re.search(r" 1\. load_checkpoint \(train\.py:3\) +- +[\d.]+% \([\d.]+m?s, (\d+) syscalls\)", done.stderr)
    assert top, done.stderr[-3000:]
    assert int(top[1]) >= 3  # sleep, open, close; a busy kernel restarts the sleep
    assert re.search(r"^getppid\(.*\) = \d+ <0\.\d{6}>  \[train\.py:6 in small\]$", done.stderr, re.MULTILINE)
    assert re.search(r"^ *[\d.]+% +[\d.]+ +[\d.]+ +20 +getppid$", done.stderr, re.MULTILINE)
    with Reader(trace) as reader:
        assert reader.info().exit_code == 3
        (process,) = reader.processes()
        assert process.exit_code == 3
        assert [span.name for span in reader.spans()] == ["process: train.py"]


@needs_ptrace
def test_json_has_the_output_to_itself(run, tmp_path):
    """The program's own output goes to standard error, the report is valid JSON, and equals the one made later."""
    done, trace = run("--format", "json", "--ml-anomaly", "--ml-clusters", "2", "-e", "trace=!futex")
    assert done.stdout, done.stderr[-3000:]
    values = json.loads(done.stdout)
    assert values["ml_analysis"]["clusters"] == 2
    assert "input\n" in done.stderr
    assert main(["trace", "report", str(trace), "--format", "json", "-o", str(tmp_path / "later.json")]) == 0
    later = json.loads((tmp_path / "later.json").read_text())
    assert later == {key: value for key, value in values.items() if key != "ml_analysis"}
    assert main(["trace", "report", str(tmp_path), "--format", "csv", "-o", str(tmp_path / "calls.csv")]) == 0
    assert len((tmp_path / "calls.csv").read_text().splitlines()) == len(values["syscalls"]) + 1


@needs_ptrace
def test_a_death_by_signal_is_passed_on(run):
    """Whoever waits for the tracer sees the signal that ended the program; what was seen is kept."""
    done, trace = run(command=("sh", "-c", "kill -SEGV $$"))
    assert done.returncode == -signal.SIGSEGV
    with Reader(trace) as reader:
        assert reader.info().exit_code == -signal.SIGSEGV
        assert reader.count("call") > 0


def test_without_permission_the_program_runs_all_the_same(run):
    """`none` is what is left where ptrace is forbidden: spans, no calls, same program."""
    done, trace = run("--backend", "none")
    assert (done.returncode, done.stdout) == (3, "input\n")
    with Reader(trace) as reader:
        assert reader.count("call") == 0
        assert [span.attributes["process.exit.code"] for span in reader.spans()] == [3]


@needs_ptrace
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(run):
    """Exit code 3, the reason, and no output of the program."""
    done, _ = run("--save", "/dev/null/t.sqlite")
    assert (done.returncode, done.stdout) == (3, "")
    assert "cannot write /dev/null/t.sqlite" in done.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@needs_ptrace
def test_strace_stands_in(run):
    """The same program under strace: its calls without lines, and the remark that says so."""
    done, trace = run("--backend", "strace", "-c")
    assert (done.returncode, done.stdout) == (3, "input\n")
    assert "strace was the tracer: calls have no lines" in done.stderr
    assert re.search(r" 20 +getppid$", done.stderr, re.MULTILINE)
    with Reader(trace) as reader:
        assert reader.info().backend == "strace"


def test_a_command_that_is_not_there_is_named(capsys, tmp_path):
    """The shell's exit code, and no trace."""
    assert main(["trace", "run", "--save", str(tmp_path / "t"), "--", "no-such-command"]) == 127
    assert "there is no command 'no-such-command'; check its name and PATH" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a command after --, or -p PID; not both"),
        (("-p", "1", "--", "true"), "not both"),
        (("-e", "trace=read,raed", "--", "true"), "there is none called raed; try -e trace="),
        (("-p", "999999999"), "there is no process 999999999"),
        (("--anomaly-realtime", "--anomaly-threshold", "0", "--", "true"), "threshold must be > 0, got 0"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(words, message, capsys, tmp_path):
    """Exit code 2, and one line that says what to do."""
    assert main(["trace", "run", "--save", str(tmp_path / "t"), *words]) == 2
    assert message in capsys.readouterr().err


def test_permission_denied_names_what_would_permit_it(monkeypatch):
    """A container and a host are told what to change, and `auto` goes on without system calls."""

    class Forbidden:
        def __init__(self, _):
            pass

        def run(self, *_):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(backends, "Tracer", Forbidden)
    backend, reason = backends.choose("auto")
    assert backend == "none"
    assert "--cap-add=SYS_PTRACE" in reason
    assert "ptrace_scope" in reason
    with pytest.raises(MachineError, match="the ptrace backend cannot be used: this machine does not permit"):
        backends.choose("ptrace")

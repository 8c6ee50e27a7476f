"""A traced program behaves as an untraced one: output, exit code, signals, children; and all its calls are counted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from entrenar.errors import MachineError
from entrenar.trace.ptrace.loop import Tracer
from entrenar.trace.ptrace.watch import CallWatcher

PROGRAMS = Path(__file__).parents[1] / "programs"
TRACE_RUN = (sys.executable, "-m", "entrenar", "trace", "run")
PYTHON = str(Path(sys.executable).resolve())


def can_trace():
    try:
        Tracer(CallWatcher(lambda _: None)).run(Path("/bin/true"), ["true"], {})
    except (OSError, MachineError):
        return False
    return True


pytestmark = pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")


def traced(*argv, wanted=None):
    calls = []
    watcher = CallWatcher(calls.extend, wanted=wanted)
    code = Tracer(watcher).run(Path(shutil.which(argv[0])), list(map(str, argv)), dict(os.environ))
    watcher.tick()
    return code, calls, watcher


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -TERM $$", -15), ("exit 300", 44)]
)
def test_the_exit_code_is_the_programs_own(script, code):
    """An exit and a death by a signal are told apart."""
    assert traced("sh", "-c", script)[0] == code


def test_the_torture_program_behaves_as_it_does_untraced(tmp_path):
    """Timers, forks, spawns, exec from a thread and a stopped child: the same end, and reads of every process seen."""
    (tmp_path / "data").write_bytes(b"x" * 1000)
    code, calls, watcher = traced(PYTHON, PROGRAMS / "torture.py", tmp_path / "data")
    assert code == 3
    reads = [call for call in calls if call.name == "pread64" and call.path == str(tmp_path / "data")]
    assert len(reads) == 20 * 5 + 4 * 30 + 8 * 20
    ends = Counter(process.exit_code for process in watcher.processes.values())
    assert ends[-9] == ends[3] == ends[7] == 1
    assert {"true", "sleep 60"} <= {process.command for process in watcher.processes.values()}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, the oracle, is not installed")
@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("torture.py", "pread64 execve clone clone3 fork vfork pipe2 setitimer unlink"),
        ("lines.py", "openat read pread64 close lseek newfstatat ioctl getdents64 write wait4 execve"),
    ],
)
def test_calls_are_counted_as_strace_counts_them(program, names, tmp_path):
    """The calls whose number does not depend on timing are as many as strace's."""
    (tmp_path / "data").write_bytes(b"x" * 1000)
    arguments = [tmp_path / "data"] if program == "torture.py" else [tmp_path, 5]
    argv = [PYTHON, str(PROGRAMS / program), *map(str, arguments)]
    subprocess.run(["strace", "-f", "-c", "-o", tmp_path / "table", *argv], check=False, stdout=subprocess.DEVNULL)
    oracle = {
        words[-1]: int(words[3])
        for words in map(str.split, (tmp_path / "table").read_text().splitlines())
        if len(words) in (5, 6) and words[3].isdigit()
    }
    ours = Counter(call.name for call in traced(*argv)[1])
    wanted = {name: oracle.get(name, 0) for name in names.split()}
    assert wanted["pread64"] > 100
    assert {name: ours[name] for name in wanted} == wanted


def test_only_the_wanted_calls_are_reported():
    """A filter reports these calls and no others."""
    _, calls, _ = traced("cat", "/etc/hostname", wanted=frozenset({"openat", "close"}))
    assert {call.name for call in calls} == {"openat", "close"}
    opened = [call.path for call in calls if call.name == "openat"]
    assert "/etc/hostname" in opened
    failed = traced("cat", "/nowhere/at/all", wanted=frozenset({"openat"}))[1]
    assert [(call.error, call.result) for call in failed if call.path == "/nowhere/at/all"] == [("ENOENT", -2)]


def test_bytes_paths_and_errors_of_a_call(tmp_path):
    """A read has its file and its bytes."""
    (tmp_path / "data").write_bytes(b"x" * 1000)
    code = f"import os; f = os.open({str(tmp_path / 'data')!r}, 0); os.read(f, 64); os.read(f, 5000)"
    reads = [call for call in traced(PYTHON, "-S", "-c", code)[1] if call.path == str(tmp_path / "data")]
    assert [call.size_bytes for call in reads if call.name == "read"] == [64, 936]


def test_a_signal_to_the_tracer_reaches_the_program(tmp_path):
    """SIGTERM and SIGUSR1 of a supervisor are the program's to handle."""
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('usr1', flush=True))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.01)"
    )
    argv = [*TRACE_RUN, "--save", tmp_path / "t.sqlite", "--", PYTHON, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tracer:
        assert tracer.stdout.readline() == "ready\n"
        tracer.send_signal(signal.SIGUSR1)
        assert tracer.stdout.readline() == "usr1\n"
        tracer.send_signal(signal.SIGTERM)
        assert tracer.wait(60) == 5


def test_a_program_outlives_a_tracer_that_is_killed(tmp_path):
    """SIGKILL to the tracer leaves the program running, with every call working."""
    program = (
        "import os, sys, time\n"
        "print(os.getpid(), flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "open(sys.argv[2], 'w').write('whole')"
    )
    go, out = tmp_path / "go", tmp_path / "out"
    argv = [*TRACE_RUN, "--save", tmp_path / "t.sqlite", "--", PYTHON, "-c", program, go, out]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tracer:
        tracer.stdout.readline()
        tracer.kill()
    go.touch()
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_text() == "whole"):
        assert time.monotonic() < deadline, "the program did not go on"
        time.sleep(0.01)


def test_attaching_sees_a_running_program_and_leaves_it_running():
    """The calls after the attach are seen with their lines; after a SIGINT the program goes on untraced."""
    program = (
        "import os, sys\nprint('ready', flush=True)\n"
        "while True:\n    sys.stdin.readline() or sys.exit(6)\n    os.getppid()"
    )
    calls = []
    watcher = CallWatcher(calls.extend, wanted=frozenset({"getppid"}))
    tracer = Tracer(watcher)
    with subprocess.Popen([PYTHON, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        hand_on = watcher.tick

        def tick():
            hand_on()
            if calls:
                tracer.stop()
            else:
                child.stdin.write("\n")
                child.stdin.flush()

        watcher.tick = tick
        assert tracer.attach(child.pid) is None
        assert [frame.line for frame in calls[0].stack] == [5]
        assert re.search(r"TracerPid:\s+0", Path(f"/proc/{child.pid}/status").read_text())
        child.stdin.close()
        assert child.wait(60) == 6


def test_a_program_that_outlives_the_command_goes_on_untraced(tmp_path):
    """What a command leaves in the background does not keep the tracer, and is not ended by it."""
    script = f"(sleep 0.6; echo done > {tmp_path / 'late'}) > /dev/null 2>&1 &"
    code, _, watcher = traced("sh", "-c", script)
    assert code == 0
    assert any(process.exit_code is None for process in watcher.processes.values())
    deadline = time.monotonic() + 60
    while not (tmp_path / "late").exists():
        assert time.monotonic() < deadline, "what the command left was not let go"
        time.sleep(0.01)


def test_what_cannot_be_executed_is_named(tmp_path):
    """A file without a program in it is refused with its reason."""
    script = tmp_path / "script"
    script.write_text("")
    script.chmod(0o755)
    with pytest.raises(MachineError, match=r"cannot run .*script: Exec format error; check its mode"):
        Tracer(CallWatcher(lambda _: None)).run(script, ["script"], {})


def test_a_late_start_sees_nothing_before_its_time(tmp_path):
    """Until the moment comes the program runs untraced; then its calls come with their lines, and its exit code."""
    program = (
        "import os, sys, time\n"
        "os.getppid()\n"
        "open(sys.argv[1], 'w').close()\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n"
        "os.getpgrp()\n"
        "sys.exit(4)"
    )
    calls = []
    watcher = CallWatcher(calls.extend)
    tracer = Tracer(watcher)
    hand_on = watcher.tick

    def tick():
        hand_on()
        if calls:
            (tmp_path / "go").touch()

    watcher.tick = tick
    argv = [PYTHON, "-c", program, str(tmp_path / "begun"), str(tmp_path / "go")]
    code = tracer.run_late(Path(PYTHON), argv, dict(os.environ), is_time=(tmp_path / "begun").exists)
    watcher.tick()
    assert code == 4
    assert [call.name for call in calls if call.name in ("getppid", "getpgrp", "execve")] == ["getpgrp"]
    assert [call.stack[0].line for call in calls if call.name == "getpgrp"] == [5]
    assert [process.exit_code for process in watcher.processes.values()] == [4]


def test_a_program_that_ends_before_its_time_is_reported(tmp_path):
    """No call, the right end."""
    watcher = CallWatcher(lambda _: None)
    argv = ["sh", "-c", "exit 9"]
    assert Tracer(watcher).run_late(Path("/bin/sh"), argv, {}, is_time=lambda: False) == 9

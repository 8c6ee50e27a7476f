"""Conditions are enforced by the kernel, told apart by how the program ends, and never passed over in silence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrenar.cli.main import main
from entrenar.errors import ConfigError, GateFailed, MachineError, NotMeasured
from entrenar.quality.chaos import ChaosConfig, Outcome, limits, run, run_function

MB = 1 << 20

_WRITES = """
import os
os.chdir({folder!r})
descriptor, done = os.open("x", os.O_CREAT | os.O_WRONLY), 0
try:
    for _ in range(9):
        os.write(descriptor, b"a")
        done += 1
except OSError as error:
    os._exit(10 + done if error.errno == 28 else 1)
"""
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
open({file!r}, "w").write(str(child.pid))
time.sleep(99)
"""


def _python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


_GROW = """
from entrenar.quality.chaos import ChaosConfig, run_function

def work():
    assert [bytearray(b"x") * (1 << 20) for _ in range({megabytes})]

outcome = run_function(ChaosConfig().with_memory_limit(128 << 20), work)
print(outcome.ending, outcome.error, list(outcome.not_enforced))
"""


def _can_mount() -> bool:
    code = (
        "from pathlib import Path; from entrenar.quality.chaos import limits; limits.mount_disk(Path('/tmp'), 1 << 20)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


CAN_MOUNT = _can_mount()


@pytest.mark.parametrize(
    ("megabytes", "told"), [(40, "survived None []\n"), (400, "refused MemoryError []\n")]
)  # fmt: skip
def test_memory_is_limited_from_where_a_function_begins(megabytes, told):
    """128 MB more than at its start: 40 fit, 400 end in a MemoryError; freed memory of this process would hide it."""
    done = subprocess.run(_python(_GROW.format(megabytes=megabytes)), capture_output=True, text=True, check=True)
    assert done.stdout == told


@pytest.mark.parametrize(("megabytes", "ending"), [(20, "survived"), (400, "crashed")])
def test_memory_is_limited_from_where_a_command_has_started(megabytes, ending):
    """After the line that ends its start-up; a traceback is a crash, not a refusal."""
    code = f"x = bytearray(200 << 20); print('ready', flush=True); input(); y = bytearray({megabytes} << 20)"
    program = f"import subprocess, sys, time\n{code.replace('input()', 'time.sleep(1)')}"
    outcome = run(ChaosConfig(memory_bytes=100 * MB, after="ready"), _python(program))
    assert outcome.ending == ending, outcome
    assert outcome.peak_bytes > 200 * MB or ending == "crashed"


def test_a_limit_that_was_never_set_is_said():
    """A command that ends before its start-up is over was not limited."""
    outcome = run(ChaosConfig(memory_bytes=MB, after="ready"), _python("print('gone')"))
    assert outcome.ending == "survived"
    assert outcome.not_enforced == ["memory: the command ended before its start-up was over"]
    with pytest.raises(NotMeasured, match="before its start-up"):
        outcome.demand()


def test_time_ends_a_program():
    """SIGTERM first, which a program may handle, and SIGKILL for one that does not listen."""
    outcome = run(ChaosConfig().with_timeout(0.3), _python("import time\nwhile True: time.sleep(1)"))
    assert (outcome.ending, outcome.exit_code, [name for _, name in outcome.sent]) == ("timed_out", -15, ["SIGTERM"])
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\nwhile True: time.sleep(1)"
    )
    outcome = run(ChaosConfig().with_timeout(3), _python(deaf))
    assert [name for _, name in outcome.sent] == ["SIGTERM", "SIGKILL"]
    with pytest.raises(GateFailed, match="timed_out"):
        outcome.demand()


def test_processor_time_is_limited_by_the_kernel():
    """A loop without end gets SIGXCPU."""
    outcome = run_function(ChaosConfig(cpu_s=1), lambda: [None for _ in iter(int, 1)])
    assert outcome.ending == "killed"
    assert outcome.exit_code == -signal.SIGXCPU


def test_a_share_of_the_processor_stops_the_program_again_and_again(monkeypatch):
    """It is stopped and let go by turns, and does its work all the same."""
    sent: list[int] = []
    killpg = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: (sent.append(number), killpg(group, number)))

    def work() -> None:
        start = time.process_time()
        while time.process_time() - start < 0.5:
            pass

    outcome = run_function(ChaosConfig().with_cpu_limit(0.2), work)
    assert outcome.ending == "survived"
    assert sent[:4] == [signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP, signal.SIGCONT]


@pytest.mark.skipif(not CAN_MOUNT, reason="this machine permits no file system of one's own")
def test_a_disk_of_its_own_is_full_for_the_program_alone(tmp_path):
    """ENOSPC inside; outside nothing is mounted and nothing remains."""
    code = f"open({str(tmp_path / 'disk' / 'x')!r}, 'wb').write(bytes(1 << 20))"
    outcome = run(ChaosConfig().with_disk_limit(64 << 10, tmp_path / "disk"), _python(code))
    assert outcome.ending == "crashed"
    assert "No space left on device" in outcome.message
    assert not any((tmp_path / "disk").iterdir())


def test_a_disk_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    """No user namespaces: the run goes on, and says what it ran without."""

    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(limits, "mount_disk", refused)
    outcome = run_function(ChaosConfig().with_disk_limit(64 << 10, tmp_path), lambda: None)
    assert outcome.is_graceful
    assert outcome.not_enforced == ["disk: a file system of its own is not permitted here (Operation not permitted)"]


def test_a_file_that_is_too_large_fails_without_a_signal(tmp_path):
    """The write is short, then EFBIG; the process lives."""

    def work() -> None:
        with (tmp_path / "x").open("wb", buffering=0) as stream:
            assert stream.write(bytes(3000)) == 1000
            with pytest.raises(OSError, match="File too large"):
                stream.write(b"x")

    assert run_function(ChaosConfig().with_file_limit(1000), work).ending == "survived"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_writes_fail_from_a_number_on(tmp_path):
    """The third write of the process fails, and all later ones."""
    outcome = run(ChaosConfig().with_failing_writes(3, "ENOSPC"), _python(_WRITES.format(folder=str(tmp_path))))
    if outcome.exit_code == 1 and "ptrace" in outcome.message:
        pytest.skip("ptrace is not permitted")
    assert (outcome.ending, outcome.exit_code) == ("refused", 12)


def test_without_strace_failing_writes_are_said_to_be_missing(monkeypatch):
    """The command runs, and the outcome is no pass."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    outcome = run(ChaosConfig().with_slow_writes(0.01), _python("print(1)"))
    assert outcome.ending == "survived"
    assert outcome.not_enforced == ["writes: slow and failing writes need strace, which is not installed"]


def test_a_signal_comes_at_the_moment_that_the_seed_gives():
    """The same seed, the same moment; the ending is the signal's."""
    config = ChaosConfig().with_signal("SIGKILL", within_s=0.4, seed=7)
    outcomes = [run_function(config, lambda: time.sleep(60)) for _ in range(2)]
    assert [outcome.ending for outcome in outcomes] == ["killed", "killed"]
    assert [outcome.exit_code for outcome in outcomes] == [-9, -9]
    assert all(len(outcome.sent) == 1 for outcome in outcomes)


@pytest.mark.parametrize(
    ("work", "ending", "code"),
    [
        (lambda: None, "survived", 0),
        (lambda: (_ for _ in ()).throw(MachineError("no room")), "refused", 3),
        (lambda: 1 // 0, "crashed", 1),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashed", -11),
        (lambda: sys.exit(4), "crashed", 1),
    ],
)
def test_endings_are_told_apart(work, ending, code):
    """A typed error is a refusal; a bug, and a signal that nobody asked for, are crashes."""
    outcome = run_function(ChaosConfig(timeout_s=30), work)
    assert (outcome.ending, outcome.exit_code) == (ending, code)


def test_builder_presets_and_file_give_the_same(tmp_path):
    """Each way to name the conditions; every fault of a file at once."""
    built = ChaosConfig().with_memory_limit(128 * MB).with_timeout(10).build()
    file = tmp_path / "chaos.toml"
    file.write_text(f"memory_bytes = {128 * MB}\ntimeout_s = 10\n")
    assert ChaosConfig.read(file) == built
    assert ChaosConfig.gentle().memory_bytes > ChaosConfig.aggressive().memory_bytes == 128 * MB
    file.write_text("memory_byte = 1\ntimeout_s = -1\nsignal = 'SIGNO'\n")
    with pytest.raises(ConfigError, match=r"(?s)timeout_s.*signal.*memory_byte"):
        ChaosConfig.read(file)
    with pytest.raises(ConfigError, match="must be a TOML file"):
        ChaosConfig.read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="belong together"):
        ChaosConfig.of({"disk_bytes": 1 << 20})


def _chaos(*words: str) -> int:
    return main(["quality", "chaos", *words])


def test_the_command_line_passes_output_through_and_tells_the_ending(capsys):
    """0 for a graceful ending, 1 for another, 5 for a condition that was not there, 2 for a wrong one."""
    assert _chaos("--timeout", "30", "--", *_python("print('hello')")) == 0
    out = capsys.readouterr().out
    assert out.startswith("hello\n[chaos: survived after ")
    assert _chaos("--timeout", "30", "--", *_python("raise SystemExit(3)")) == 0
    assert _chaos("--timeout", "30", "--", *_python("1 / 0")) == 1
    assert _chaos("--memory", "1MiB", "--after", "ready", "--", *_python("print('gone')")) == 5
    assert _chaos("--timeout", "30") == 2
    assert _chaos("--", "true") == 2
    assert _chaos("--memory", "lots", "--", "true") == 2
    assert _chaos("--timeout", "5", "--", "/no/such/program") == 2
    assert "the command cannot be started: /no/such/program" in capsys.readouterr().err


def test_the_outcome_is_there_as_json(tmp_path, capsys):
    """For a script; flags override the file, the file the preset."""
    file = tmp_path / "chaos.toml"
    file.write_text("timeout_s = 50\n")
    assert _chaos(
        "--preset", "gentle", "--config", str(file), "--cpu-share", "0.9", "--json", "--", *_python("print(1)")
    ) in (0, 5)
    told = json.loads(capsys.readouterr().out)
    assert told["ending"] == "survived"
    assert told["message"] == "1"


def test_an_outcome_that_is_not_graceful_is_demanded_in_vain():
    """Every ending but two fails."""
    for ending in ("killed", "timed_out", "crashed"):
        with pytest.raises(GateFailed, match=ending):
            Outcome(ending, 1, None, "", 1.0, 0, [], []).demand()


def test_no_process_is_left_behind(tmp_path):
    """A program's children go with it when its time is over."""
    code = _PARENT.format(file=str(tmp_path / "pid"))
    run(ChaosConfig().with_timeout(2), _python(code))
    child = int((tmp_path / "pid").read_text())
    for _ in range(500):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"process {child} lives on")

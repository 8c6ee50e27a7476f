"""`entrenar watch`: shows a run until it ends, and never needs torch."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from entrenar import locks
from entrenar.cli import watch
from entrenar.cli.main import main

from ..report.conftest import record


@pytest.fixture
def run_dir(tmp_path):
    """A run of two steps and an alarm."""
    folder = tmp_path / "a"
    folder.mkdir()
    append(folder, record(1), record(2, held_out={"loss": 2.5}))
    (folder / "events.jsonl").write_text('{"step": 1, "kind": "loss_spike", "message": "m"}\n')
    return folder


def append(folder, *rows) -> None:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_does_not_run_is_shown_once(run_dir, capsys):
    """Its newest events and evaluations, how it ended, and what to do next."""
    assert main(["watch", "a", "--runs-dir", str(run_dir.parent)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "step 1: loss spike: m", "step 2  loss 2.9800  held-out 2.5000  500 tokens/s", "",
        "a: stopped at step 2", f"Next: entrenar report {run_dir}",
    ]  # fmt: skip


def test_without_a_name_the_run_that_wrote_last_is_shown(run_dir, capsys):
    """What most people want."""
    other = run_dir.parent / "b"
    other.mkdir()
    append(other, record(1))
    for written_s, name in ((1, "a"), (2e9, "b")):
        os.utime(other / "metrics.jsonl", (written_s, written_s))
        assert main(["watch", "--runs-dir", str(run_dir.parent)]) == 0
        assert f"Next: entrenar report {run_dir.parent / name}" in capsys.readouterr().out
    assert main(["watch", "--runs-dir", str(run_dir.parent / "nothing")]) == 2
    assert "`entrenar quickstart` makes the first one" in capsys.readouterr().err


def test_a_run_is_followed_until_its_process_lets_go(run_dir, capsys):
    """What it writes between two looks is shown, once; the last steps are read after the lock is released."""
    with ExitStack() as process:
        process.enter_context(locks.held(run_dir / ".lock", "a"))
        turns = iter([lambda: append(run_dir, record(3)), lambda: None, lambda: append(run_dir, record(4), record(5))])

        def wait() -> None:
            turn = next(turns, None)
            if turn is None:
                append(run_dir, record(6))
                process.close()
            else:
                turn()

        watch.follow(run_dir, watch.Lines(), wait)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said if "loss 2." in line] == ["2", "3", "5", "6"]


def test_once_does_not_wait(run_dir):
    """Although the run goes on."""
    with locks.held(run_dir / ".lock", "a"):
        watch.follow(run_dir, watch.Lines(), lambda: pytest.fail("it waited"), is_once=True)


def test_leaving_with_ctrl_c_is_no_failure(run_dir, capsys, monkeypatch):
    """The run goes on, and that is said."""

    def leave(seconds: float) -> None:
        assert seconds == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", leave)
    with locks.held(run_dir / ".lock", "a"):
        assert main(["watch", str(run_dir), "--every", "3"]) == 0
    assert "a: runs now" in capsys.readouterr().out


def test_on_a_terminal_it_is_drawn(run_dir, capsys, monkeypatch):
    """Not as lines; a terminal that cannot move its cursor gets lines."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for terminal, drawn in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", terminal)
        assert main(["watch", str(run_dir), "--once"]) == 0
        assert ("gradient norm" in capsys.readouterr().out) is drawn


def test_it_is_served_until_ctrl_c(run_dir, capsys, monkeypatch):
    """The address is printed before it waits."""

    def serve(server) -> None:
        assert server.url in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.PageServer, "serve_forever", serve)
    assert main(["watch", str(run_dir), "--http", "0"]) == 0


@pytest.mark.parametrize("port", ["-1", "65536", "x", "99999999", "٣"])
def test_a_wrong_port_is_a_usage_error(run_dir, capsys, port):
    """Exit 2, with the range."""
    assert main(["watch", str(run_dir), f"--http={port}"]) == 2
    assert "must be a port, 0 to 65535" in capsys.readouterr().err


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(run_dir, capsys):
    """Exit 2."""
    assert main(["watch", "b", "--runs-dir", str(run_dir.parent)]) == 2
    assert "has no run 'b'; the runs there are: a" in capsys.readouterr().err


def test_it_answers_without_torch(run_dir):
    """As a picture, as lines, and as a page."""
    program = (
        "import sys; from entrenar.cli.main import main; from entrenar.report.serve import LivePage; "
        f"main(['watch', {str(run_dir)!r}]); import pathlib; LivePage(pathlib.Path({str(run_dir)!r})).text(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

"""A run by the server is the run that pytest makes, of the sources as they now are."""

import socket
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "entrenar.quality.pytest_server"]


def run(toy, *arguments):
    return subprocess.run(
        [*COMMAND, "run", *arguments], check=False, cwd=toy, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def server(toy):
    process = subprocess.Popen([*COMMAND, "serve", "pytest", "json"], cwd=toy, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "serving; stop with Ctrl-C\n"
    yield process
    process.terminate()
    process.communicate(timeout=10)


def test_the_server_runs_the_sources_as_they_are(toy, server):
    """A passing run ends with 0; after an edit the same server sees the failure; output comes to the one who asks."""
    passed = run(toy, "-q")
    assert (passed.returncode, "2 passed" in passed.stdout) == (0, True)
    (toy / "toy.py").write_text((toy / "toy.py").read_text().replace("x * 2", "x * 3"))
    failed = run(toy, "-q")
    assert failed.returncode == 1
    assert "1 failed, 1 passed" in failed.stdout
    assert "assert 9 == 6" in failed.stdout
    assert server.poll() is None


def test_it_serves_its_owner_alone(toy, server):
    """Nobody else may connect, since who connects runs code."""
    assert (toy / ".test-server").stat().st_mode & 0o077 == 0


def test_without_a_server_pytest_runs_at_once(toy, monkeypatch):
    """The same command works cold, also beside the socket of a server that died."""
    assert "2 passed" in run(toy, "-q").stdout
    with socket.socket(socket.AF_UNIX) as dead:
        monkeypatch.chdir(toy)
        dead.bind(".test-server")
    assert "2 passed" in run(toy, "-q").stdout


def test_a_threaded_import_is_refused(toy):
    """A fork of a threaded process could hang, so the server does not start."""
    (toy / "busy.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    refused = subprocess.run(
        [*COMMAND, "serve", "busy"], check=False, cwd=toy, capture_output=True, text=True, timeout=30
    )
    assert refused.returncode == 1
    assert "2 threads run after the imports" in refused.stderr
    assert not (toy / ".test-server").exists()


def test_an_idle_server_ends(toy):
    """Nobody asks, so it goes, and takes its socket along."""
    code = "import entrenar.quality.pytest_server as r; r._IDLE_S = 0.2; raise SystemExit(r.serve(['json']))"
    began = time.monotonic()
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=toy, capture_output=True, timeout=30).returncode
        == 0
    )
    assert time.monotonic() - began < 20
    assert not (toy / ".test-server").exists()

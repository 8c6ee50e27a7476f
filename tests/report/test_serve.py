"""`report.serve`: the page of a run on the loopback address, as new as its files."""

import http.client
import json
import shutil
import socket
import subprocess
import threading

import pytest

from entrenar.errors import ConfigError
from entrenar.report.serve import LivePage, PageServer

from .conftest import record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def has_loopback() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            socket.create_connection(server.getsockname(), timeout=30).close()
        except OSError:
            return False
    return True


@pytest.fixture
def served(make_run):
    """A run, and a server for it that answers in a thread."""
    if not has_loopback():
        pytest.skip("this machine's loopback interface is down")
    folder = make_run("a", [record(1)])
    with PageServer(LivePage(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, host: str | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_the_page_is_as_new_as_the_run(served):
    """The stamp changes with the files, and the page with the stamp."""
    folder, server = served
    answer, page = get(server, "/")
    _, stamp = get(server, "/stamp")
    assert answer.status == 200
    assert f'"{stamp}"' in page
    assert '"step":[1]' in page
    assert get(server, "/")[1] == page
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(record(2)) + "\n")
    assert get(server, "/stamp")[1] != stamp
    assert '"step":[1,2]' in get(server, "/")[1]


def test_nothing_may_load_from_elsewhere(served):
    """The policy of the page allows this address alone; nothing is kept."""
    headers = get(served[1], "/")[0].headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"


def test_other_names_and_paths_are_refused(served):
    """A page elsewhere cannot read the run by a name that points here; no other file is served."""
    server = served[1]
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/", host="evil.example")[0].status == 421
    assert get(server, "/", host=f"localhost:{server.server_port}")[0].status == 200
    assert get(server, "/../config.toml")[0].status == 404


def test_a_run_without_a_step_says_so_until_there_is_one(make_run):
    """The page reloads itself."""
    folder = make_run("a", [])
    page = LivePage(folder)
    assert "No step is recorded yet." in page.text()
    assert "location.reload" in page.text()
    (folder / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    assert "No step is recorded yet." not in page.text()
    (folder / "metrics.jsonl").unlink()
    assert page.stamp().startswith("0-")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_reloads_the_page_once_the_run_has_written_more(served, tmp_path, monkeypatch):
    """The stamp it asks for differs from that of its page: it loads the new one, under our policy, in silence."""
    folder, server = served
    shown = []

    def text() -> str:
        page = LivePage(folder).text()
        shown.append(page)
        if len(shown) == 1:
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps(record(2)) + "\n")
        return page

    monkeypatch.setattr(server.page, "text", text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert len(shown) == 2
    assert '"step":[1,2' in done.stdout
    assert "CONSOLE" not in done.stderr


def test_a_port_that_is_taken_is_refused_with_a_remedy(served):
    """Our own error."""
    port = served[1].server_port
    with pytest.raises(ConfigError, match=f"port {port} cannot be used .*; choose another, or 0"):
        PageServer(LivePage(served[0]), port)

"""Serve a run's report page to a browser on this machine, and tell the browser when there is more to see.

Only the loopback address listens. A request whose Host is another name is refused: a page elsewhere could point a name
of its own at 127.0.0.1 and read the answer (DNS rebinding).
"""

from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from entrenar.errors import ConfigError, EntrenarError
from entrenar.report.history import read_history
from entrenar.report.page import render
from entrenar.runs import RunFolder

_HOST = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
}
# Reloads the page when the run has written more, unless the box is cleared, and keeps the choices made on the page.
_REFRESH = """<label style="position:fixed;right:1em;top:1em"><input type="checkbox" id="live" checked> live</label>
<script>
"use strict";
(() => {
  const live = document.getElementById("live"), boxes = ["log", "raw"].map((id) => document.getElementById(id));
  const root = document.documentElement, chosen = JSON.parse(sessionStorage.getItem("chosen") ?? "null");
  if (chosen && boxes[0]) {
    boxes.forEach((box, index) => { box.checked = chosen.boxes[index]; });
    if (chosen.theme) root.dataset.theme = chosen.theme;
    boxes[0].dispatchEvent(new Event("change"));
  }
  addEventListener("pagehide", () => {
    if (boxes[0]) sessionStorage.setItem("chosen", JSON.stringify({ boxes: boxes.map((box) => box.checked), theme: root.dataset.theme }));
  });
  setInterval(async () => {
    if (!live.checked || document.hidden) return;
    try {
      if (await (await fetch("stamp")).text() !== "STAMP") location.reload();
    } catch { live.parentElement.lastChild.textContent = " entrenar watch has ended"; }
  }, 3000);
})();
</script>
</body>"""  # noqa: E501  # JavaScript
_NOTHING = "<!doctype html>\n<meta charset=utf-8><title>entrenar</title>\n<body><p>No step is recorded yet.</p></body>"


class LivePage:
    """The current report of a run, rendered again only when the run's files have changed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._made: tuple[str, str] | None = None

    def stamp(self) -> str:
        """Return a text that changes whenever the run has written something."""
        run = RunFolder(self._folder)
        return "-".join(_stamp(path) for path in (run.metrics, run.events, run.checkpoints))

    def text(self) -> str:
        """Return the page, with the lines that reload it."""
        with self._lock:
            stamp = self.stamp()
            if self._made is None or self._made[0] != stamp:
                self._made = (stamp, self._written(stamp))
            return self._made[1]

    def _written(self, stamp: str) -> str:
        try:
            page = render([read_history(self._folder)])
        except (EntrenarError, OSError):  # before the first step, and between two files of a run that begins
            page = _NOTHING
        before, _, after = page.rpartition("</body>")
        return before + _REFRESH.replace("STAMP", stamp) + after


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "0"
    return f"{status.st_ino}.{status.st_size}.{status.st_mtime_ns}"


class PageServer(ThreadingHTTPServer):
    """Answers for one page on the loopback address."""

    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used ({error.strerror}); choose another, or 0 for any free one"
            ) from error

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://{_HOST}:{self.server_port}/"

    def own_names(self) -> Sequence[str]:
        """Return the values of a Host header that mean this server."""
        return [f"{name}:{self.server_port}" for name in (_HOST, "localhost")]


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page, or with its stamp."""
        if self.headers.get("Host") not in self.server.own_names():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path == "/":
            self._answer("text/html", self.server.page.text())
        elif self.path == "/stamp":
            self._answer("text/plain", self.server.page.stamp())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        for name, value in {
            **_HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # a browser that has gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the terminal shows the run."""

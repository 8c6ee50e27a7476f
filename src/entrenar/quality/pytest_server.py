"""A resident test server: third-party imports stay loaded, and each run is a fork of the server.

Importing torch takes longer than checking every gradient, so the server imports the third parties once and forks for
each request; the project's own modules are imported by the child alone, so an edit is always seen. The child writes to
the terminal of the client, whose standard streams travel over the socket.

    python -m entrenar.quality.pytest_server serve torch hypothesis …  stays in the foreground; ends after an idle hour
    python -m entrenar.quality.pytest_server run ARGUMENTS_OF_PYTEST   asks the server, or runs pytest itself

Restart it after installing packages. It serves the folder it was started in, and there only its owner.
"""

import gc
import importlib
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

SOCKET = Path(".test-server")
_IDLE_S = 3600
_PYTEST_NOT_RUN = 3


def serve(modules: Sequence[str]) -> int:
    """Import the modules, then answer until nobody asked for an hour."""
    for name in modules:
        importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        sys.stderr.write(f"{threads} threads run after the imports; a fork of them could hang, so nothing is served\n")
        return 1
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children need not be waited for
    SOCKET.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        mask = os.umask(0o077)
        listening.bind(str(SOCKET))
        os.umask(mask)
        listening.listen()
        listening.settimeout(_IDLE_S)
        sys.stderr.write("serving; stop with Ctrl-C\n")
        try:
            while True:
                _answer(listening)
        except (TimeoutError, KeyboardInterrupt):
            return 0
        finally:
            SOCKET.unlink(missing_ok=True)


def _answer(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if os.fork() == 0:
            _run_here(connection, message.decode().split("\0"), streams)
        for stream in streams:
            os.close(stream)


def _run_here(connection: socket.socket, arguments: Sequence[str], streams: Sequence[int]) -> None:
    """Run pytest on the client's streams, send the exit code, and end this process."""
    status = _PYTEST_NOT_RUN
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        status = _pytest(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(struct.pack("i", status))
        os._exit(status)


def ask(arguments: Sequence[str]) -> int:
    """Let the server run pytest; return its exit code. Without a server, run it here."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(SOCKET))
        except (FileNotFoundError, ConnectionRefusedError):
            return _pytest(arguments)
        socket.send_fds(connection, ["\0".join(arguments).encode()], [0, 1, 2])
        answer = connection.recv(4)
        return int(struct.unpack("i", answer)[0]) if answer else _PYTEST_NOT_RUN


def _pytest(arguments: Sequence[str]) -> int:
    import pytest  # noqa: PLC0415 - a client of a server does not need it

    return int(pytest.main(list(arguments)))


if __name__ == "__main__":
    sys.exit({"serve": serve, "run": ask}[sys.argv[1]](sys.argv[2:]))

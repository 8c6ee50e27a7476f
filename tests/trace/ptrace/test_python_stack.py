"""Every call gets the function and the line that made it, whatever the Python and the shape of the program."""

import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from entrenar.errors import MachineError
from entrenar.trace import backends
from entrenar.trace.ptrace.loop import Tracer
from entrenar.trace.ptrace.python_stack import line_table
from entrenar.trace.ptrace.watch import CallWatcher

PROGRAMS = Path(__file__).parents[1] / "programs"


def can_trace():
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


pytestmark = pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")


def pythons():
    """Return one interpreter of each version that is read, as far as they are installed."""
    candidates = [
        Path(sys.executable).resolve(),
        *map(Path, filter(None, map(shutil.which, ("python3.11", "python3.12", "python3.13")))),
    ]
    candidates += sorted(Path.home().glob(".pyenv/versions/3.1[123]*/bin/python3"))
    found = {}
    for path in candidates:
        answer = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            found.setdefault(answer.stdout.strip(), path)
    return list(found.values())


def traced(program, argv, environment=None):
    calls = []
    watcher = CallWatcher(calls.extend)
    code = Tracer(watcher).run(Path(program), [str(program), *map(str, argv)], environment or {"PATH": "/usr/bin:/bin"})
    watcher.tick()
    return code, calls, watcher


@pytest.mark.parametrize("python", pythons(), ids=lambda path: str(path).replace("/", "_"))
def test_every_read_has_its_function_and_line(python, tmp_path):
    """Main thread, threads, generators, recursion, lambdas, a forked child, a name that is not ASCII: all of them."""
    code, calls, watcher = traced(python, [PROGRAMS / "lines.py", tmp_path, 10])
    assert code == 0
    wrong = Counter()
    right = 0
    for call in calls:
        path = Path(call.path or "/")
        if call.name == "pread64" and path.parent == tmp_path:
            frame = call.stack[0]
            is_right = frame.line == call.arguments[2] - 1000 and path.name in frame.function.split(".")
            right += is_right
            wrong[(path.name, call.arguments[2] - 1000, frame)] += not is_right
    assert right == 10 * (1 + 6 + 3 + 3 + 3 + 10 + 1) + 3 * 10 * 4 + 10
    assert not +wrong
    child = [call for call in calls if call.path and call.path.endswith("/child") and call.name == "pread64"]
    assert {call.pid for call in child} == set(watcher.processes) - {calls[0].pid}
    assert all(frame.file == str(PROGRAMS / "lines.py") for frame in child[0].stack)


def code_objects():
    """Yield the code of some modules of the standard library."""
    for module in ("argparse", "typing", "asyncio.base_events", "dataclasses", "json.decoder"):
        source = Path(__import__(module, fromlist=["x"]).__file__).read_text()
        pending = [compile(source, module, "exec")]
        while pending:
            code = pending.pop()
            yield code
            pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def test_the_line_table_is_read_as_python_reads_it():
    """The lines of thousands of instructions equal those of co_positions."""
    seen = 0
    for code in code_objects():
        wanted = [position[0] or 0 for position in code.co_positions()]
        assert line_table(code.co_linetable, code.co_firstlineno) == wanted
        seen += len(wanted)
    assert seen > 10_000


def test_a_python_of_an_unknown_version_is_traced_without_lines_and_named(tmp_path, monkeypatch):
    """A layout that is not known gives a remark, not wrong lines."""
    monkeypatch.setattr("entrenar.trace.ptrace.python_layout._KNOWN", {})
    monkeypatch.setattr("entrenar.trace.ptrace.python_layout._described", lambda *_: (_ for _ in ()).throw(
        __import__("entrenar.trace.ptrace.python_layout", fromlist=["x"]).UnknownPython("Python 3.99: not known")
    ))  # fmt: skip
    code, calls, watcher = traced(Path(sys.executable).resolve(), ["-S", "-c", "open('/dev/null').close()"])
    assert code == 0
    assert calls
    assert not any(call.stack for call in calls)
    assert any("no lines" in note for note in watcher.notes)

"""One trace from the launcher to the system call, and a program that no trouble of the tracer touches."""

import sys
import time
from dataclasses import replace

import pytest

from entrenar.cli.main import main
from entrenar.errors import DiskFullError, MachineError
from entrenar.trace import backends
from entrenar.trace.reader import Reader
from entrenar.trace.records import Process, SystemCall
from entrenar.trace.session import Plan, Session, program_name
from entrenar.trace.store import Writer

PLAN = Plan(("python", "train.py"), "ptrace", 1)


def can_trace():
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


@pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")
def test_spans_of_the_program_hold_its_calls_and_reach_the_collector(tmp_path, collector, monkeypatch, capfd):
    """One trace: the launcher's, the process under it, the program's span, the call with its line under that."""
    script = tmp_path / "spans.py"
    script.write_text(
        "import time\n"
        "from opentelemetry import trace\n"
        "from entrenar.trace.provider import from_environment\n"
        "with from_environment().get_tracer('x').start_as_current_span('step', attributes={'entrenar.step': 1}):\n"
        "    time.sleep(0.01)\n"
    )
    monkeypatch.setenv("TRACEPARENT", f"00-{'a' * 32}-{'b' * 16}-01")
    trace = tmp_path / "t.sqlite"
    code = main([
        "trace", "run", "--save", str(trace), "--otlp-endpoint", collector.grpc, "--otlp-protocol", "grpc",
        "--otlp-service-name", "llama-training", "--", sys.executable, str(script),
    ])  # fmt: skip
    errors = capfd.readouterr().err
    assert code == 0
    assert "[entrenar: OTLP export enabled]" in errors
    assert "View traces at: http://127.0.0.1:16686" in errors
    with Reader(trace) as reader:
        (step,) = reader.spans(name="step")
        (sleep,) = [call for call in reader.calls() if call.name == "clock_nanosleep"]
    assert (sleep.span, sleep.stack[0].line) == (step.id, 5)
    assert collector.services == {"llama-training"}
    found = {span.name: span for span in collector.spans}
    assert {span.trace_id.hex() for span in collector.spans} == {"a" * 32}
    assert found["process: spans.py"].parent_span_id.hex() == "b" * 16
    assert found["step"].parent_span_id == found["process: spans.py"].span_id
    assert found["syscall: clock_nanosleep"].parent_span_id == found["step"].span_id


def processes(**changes):
    return {7: replace(Process(7, None, "python train.py", 1), **changes)}


def test_a_full_disk_ends_the_trace_and_what_was_seen_before_is_kept(tmp_path):
    """The session goes on without its store and says so."""
    writer = Writer(tmp_path / "t.sqlite")
    session = Session(PLAN, writer)
    old = time.monotonic_ns() - 10**9
    session.take([SystemCall("read", 7, 7, old, 5, 1)], processes())
    writer._db.execute("pragma max_page_count = 1")
    many = [SystemCall("read", 7, 7, old + at, 5, 1, path=f"/file/{at}") for at in range(5000)]
    session.take(many, processes())
    info = session.finish(0, ())
    assert not session.is_stored
    assert "the trace ends here: no space left to write" in info.notes[0]
    with Reader(tmp_path / "t.sqlite") as reader:
        assert [call.name for call in reader.calls()] == ["read"]
    with pytest.raises(DiskFullError, match="no space left"):
        writer.add_calls(many, [None] * len(many))


def test_the_root_is_the_process_and_children_lie_under_it(tmp_path):
    """Each process has a span, with its end, its exit code and its rank."""
    session = Session(replace(PLAN, parent=0xB), Writer(tmp_path / "t.sqlite"))
    family = processes(ended_ns=90, exit_code=0) | {8: Process(8, 7, "python worker.py", 20, 80, -9, rank=1)}
    session.take((), family)
    session.finish(0, ("a remark",))
    with Reader(tmp_path / "t.sqlite") as reader:
        root, child = reader.spans()
        assert reader.info().notes == ("a remark",)
    assert (root.id, root.parent, root.name, root.status) == (session.root_id, 0xB, "process: train.py", "ok")
    assert (child.parent, child.name, child.status) == (root.id, "process: worker.py", "error")
    assert child.attributes["entrenar.rank"] == 1
    assert child.attributes["process.exit.code"] == -9
    assert not session.folder.exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/venv/bin/python train.py --lr 1", "train.py"), ("python3 -m entrenar train --config x", "entrenar train"),
        ("python -c pass", "python -c"), ("/usr/bin/cat x", "cat"), ("python -u x/y.py", "y.py"), ("python", "python"),
    ],
)  # fmt: skip
def test_a_command_is_called_what_a_person_calls_it(command, name):
    """The script or module, not the interpreter."""
    assert program_name(command.split()) == name

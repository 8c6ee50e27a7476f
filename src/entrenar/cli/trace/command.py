"""`entrenar trace run [OPTIONS] -- COMMAND`: run a command, say where its time went, keep the trace."""

import argparse
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from entrenar.cli.trace import generated
from entrenar.cli.trace.observers import AnomalyLines, CallLines
from entrenar.cli.trace.otlp import Export
from entrenar.cli.trace.output import conclude, program_output_aside
from entrenar.errors import ConfigError
from entrenar.trace import backends, launch
from entrenar.trace.anomaly import METHODS, Sensitivity
from entrenar.trace.backends import Start
from entrenar.trace.decisions import marks as decision_marks
from entrenar.trace.otlp_exporter import PROTOCOLS
from entrenar.trace.ptrace import numbers
from entrenar.trace.session import Observer, Plan, Session, program_name
from entrenar.trace.store import CALL_ROWS, IO_CALLS, Writer
from entrenar.trace.system_metrics import SystemMetrics

_COMMAND_NOT_FOUND = 127


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.usage = "entrenar trace run [OPTIONS] -- COMMAND [ARGUMENT …]\n       entrenar trace run [OPTIONS] -p PID"
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run")
    parser.add_argument("-p", "--pid", type=int, help="attach to a running process instead; Ctrl-C lets go of it")
    _add_calls(parser.add_argument_group("system calls"))
    _add_spans(parser.add_argument_group("spans"))
    _add_otlp(parser.add_argument_group("OpenTelemetry"))
    _add_analysis(parser.add_argument_group("analysis"))
    generated.add(parser.add_argument_group("generated code"))
    _add_output(parser.add_argument_group("output"))


def _add_calls(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-e", "--expression", metavar="trace=CALLS", help="only these: names with commas, or io; a leading ! excludes"
    )
    group.add_argument("-f", "--follow", action="store_true", help="follow threads and children: always done")
    group.add_argument("--backend", choices=backends.BACKENDS, default="auto", help="what sees the calls (auto)")
    group.add_argument(
        "--from-first-span", action="store_true",
        help="see calls only from the program's first span on: the imports of torch alone make 50,000",
    )  # fmt: skip
    group.add_argument("--no-stacks", action="store_true", help="do not read Python stacks: a third cheaper a call")


def _add_spans(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace-compute", action="store_true", help="ask the program for spans of layers and blocks")
    group.add_argument("--trace-compute-all", action="store_true", help="of every module, down to a single projection")
    group.add_argument("--no-spans", action="store_true", help="do not ask the program for spans")
    group.add_argument(
        "--trace-compute-threshold", type=float, default=100.0, metavar="US",
        help="blocks shorter than this many µs are counted in their parent (100)",
    )  # fmt: skip


def _add_otlp(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--otlp-endpoint", metavar="URL", help="send spans and slow calls to this collector as they come"
    )
    group.add_argument("--otlp-service-name", default="entrenar", metavar="NAME", help="as this service (entrenar)")
    group.add_argument(
        "--otlp-protocol", choices=PROTOCOLS, default="auto", help="by the port: 4318 is http, else grpc"
    )


def _add_analysis(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--anomaly-realtime", action="store_true", help="say at once when a call or block is slow")
    group.add_argument("--anomaly-threshold", type=float, default=3.0, metavar="SIGMA", help="from how far on (3.0)")
    group.add_argument("--anomaly-method", choices=METHODS, default=METHODS[0], help="robust, or the classic z-score")
    group.add_argument("--on-high-anomaly", metavar="COMMAND", help="run this for a High anomaly; 'stop' ends the run")
    group.add_argument("--ml-anomaly", action="store_true", help="cluster the calls by duration and size")
    group.add_argument("--ml-clusters", type=int, metavar="N", help="how many clusters (chosen by silhouette)")
    group.add_argument("--ml-compare", action="store_true", help="compare the clusters with the z-score")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--function-time", action="store_true", help="the table of hot paths (the default report)")
    group.add_argument("--source", action="store_true", help="print calls of the program's own code, with their lines")
    group.add_argument("-T", "--times", action="store_true", help="print the time spent in each call")
    group.add_argument("-c", "--summary", action="store_true", help="the table of system calls, as strace -c")
    group.add_argument("--stats-extended", action="store_true", help="percentiles of each system call")
    group.add_argument("--call-graph", action="store_true", help="who called whom")
    group.add_argument(
        "--format", choices=("text", "json", "csv", "html"), default="text",
        help="text goes to standard error. The others go to standard output, and the program's own output to standard "
        "error, unless -o names a file",
    )  # fmt: skip
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report here")
    group.add_argument("--save", type=Path, metavar="FILE", help="keep the trace here (traces/PROGRAM-DATE.sqlite)")
    group.add_argument("--max-calls", type=int, default=CALL_ROWS, metavar="N", help="rows of calls that are kept")


def execute(parsed: argparse.Namespace) -> int:
    """Trace a command; return its own exit code, and die by the signal that it died by."""
    words = [word for at, word in enumerate(parsed.command) if at or word != "--"]
    if bool(words) == (parsed.pid is not None):
        raise ConfigError("trace run needs a command after --, or -p PID; not both")
    watch = backends.Watch(wanted_calls(parsed.expression), with_stacks=not parsed.no_stacks)
    command = words or _command_of(parsed.pid)
    program = None if parsed.pid else shutil.which(command[0])
    if program is None and parsed.pid is None:
        print(f"entrenar trace run: there is no command {command[0]!r}; check its name and PATH", file=sys.stderr)
        return _COMMAND_NOT_FOUND
    code = _traced(parsed, command, Path(program) if program else None, watch)
    if code is not None and code < 0:
        _die_by(-code)
    return code or 0


def _traced(
    parsed: argparse.Namespace, command: Sequence[str], program: Path | None, watch: backends.Watch
) -> int | None:
    backend, reason = backends.choose("ptrace" if program is None else parsed.backend)
    if reason:
        print(f"[entrenar trace: {reason}]", file=sys.stderr)
    inherited = launch.inherited(os.environ)
    plan = Plan(
        tuple(command), backend, inherited.trace_id, inherited.parent, round(parsed.trace_compute_threshold * 1e3),
        backends.floor_ns() if backend == "ptrace" else 0,
    )  # fmt: skip
    path = parsed.save or Path("traces") / f"{program_name(command)}-{time.strftime('%Y%m%d-%H%M%S')}.sqlite"
    observers = _observers(parsed)
    maps = generated.maps(parsed)
    decisions = generated.decisions(parsed)
    otlp = Export(parsed) if parsed.otlp_endpoint else None
    session = Session(plan, Writer(path, call_rows=parsed.max_calls), [*observers, *([otlp.take] if otlp else [])])
    session.samplers.append(SystemMetrics(session.living))
    session.add_marks(decision_marks(decisions, at_ns=session.started_ns))
    if otlp is not None:
        otlp.begin(session)
    take = generated.at_origin(maps, session.take)
    wants = launch.Wants(session.folder, plan.trace_id, session.root_id, _groups(parsed), plan.shortest_ns)
    if program is None:
        ended = backends.attach(parsed.pid, watch, take)
    else:
        environment = launch.environment(os.environ, program, wants)
        with program_output_aside(is_needed=parsed.format != "text" and parsed.output is None):
            start = Start(program, command, environment, session.has_spans if parsed.from_first_span else None)
            ended = backends.run(backend, start, watch, take)
    info = session.finish(ended.exit_code, (*((reason,) if reason else ()), *ended.notes))
    if otlp is not None:
        otlp.finish(session)
    conclude(parsed, path, observers, info.notes)
    if otlp is not None:
        otlp.conclude()
    return ended.exit_code


def _groups(parsed: argparse.Namespace) -> str:
    if parsed.no_spans:
        return "off"
    if parsed.trace_compute_all:
        return "all"
    return "layers" if parsed.trace_compute else "phases"


def wanted_calls(expression: str | None) -> frozenset[str] | None:
    """Return the calls that `-e trace=…` names; None for all.

    Raises: ConfigError for a name that is no system call.
    """
    if expression is None:
        return None
    text = expression.removeprefix("trace=")
    is_excluding = text.startswith("!")
    known = frozenset(numbers.names().values())
    named: set[str] = set()
    for name in text.removeprefix("!").split(","):
        named |= known if name == "all" else IO_CALLS & known if name in ("io", "file", "desc") else {name}
    if unknown := sorted(named - known):
        raise ConfigError(
            f"-e names system calls, and there is none called {', '.join(unknown)}; try -e trace=read,openat"
        )
    return known - named if is_excluding else frozenset(named)


def _observers(parsed: argparse.Namespace) -> list[Observer]:
    observers: list[Observer] = []
    if parsed.source or parsed.times:
        observers.append(CallLines(with_source=parsed.source, with_time=parsed.times))
    if parsed.anomaly_realtime:
        sensitivity = Sensitivity(threshold=parsed.anomaly_threshold)
        observers.append(AnomalyLines(sensitivity, parsed.anomaly_method, parsed.on_high_anomaly))
    return observers


def _command_of(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise ConfigError(f"-p needs the id of a running process, and there is no process {pid}") from error
    return tuple(word.decode("utf-8", "replace") for word in raw.rstrip(b"\0").split(b"\0"))


def _die_by(number: int) -> None:
    """Die by the signal that ended the program, so that our parent sees the same status; write no core dump."""
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

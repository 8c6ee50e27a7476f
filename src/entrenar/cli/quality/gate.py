"""`entrenar quality gate`: run what a tier or a phase asks for, or show that each gate can fail."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from entrenar.cli.quality.output import emit
from entrenar.errors import ConfigError, GateFailed, NotMeasured
from entrenar.quality import gate, selftest
from entrenar.quality.debt.report import dumps


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("names", nargs="*", metavar="GATE", help="only these")
    parser.add_argument("--tier", type=int, choices=gate.TIERS, help="what this tier asks for, and those below it")
    parser.add_argument("--phase", choices=gate.PHASES, help="the gates of a phase of the specification")
    parser.add_argument("--selftest", action="store_true", help="plant one violation a gate; each must be noticed")
    parser.add_argument("--list", action="store_true", help="print the gates and run nothing")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.set_defaults(check=_gate)


def _gate(parsed: argparse.Namespace) -> int:
    gates = gate.chosen(gate.load(parsed.project / gate.GATES_FILE), parsed.tier, parsed.phase, parsed.names)
    if not gates:
        raise ConfigError(f"no gate belongs to {parsed.phase or f'tier {parsed.tier}'}")
    if parsed.list:
        print("\n".join(f"{one.name}: {one.run} ({one.against})" for one in gates))
        return 0
    if parsed.selftest:
        return _selftest(gates, parsed.project)
    results = []
    for result in gate.run_gates(gates, parsed.project):
        results.append(result)
        print(f"{result.verdict} {result.gate.name}", file=sys.stderr)
        if result.verdict != "passed":
            print(result.outcome.tail(), file=sys.stderr)
    table = "\n".join(gate.table(results))
    emit(table if parsed.format == "text" else dumps(gate.as_json(results)), parsed.output)
    missed = [result for result in results if result.verdict == "failed"]
    if missed:
        raise GateFailed(f"{len(missed)} of {len(results)} gates failed: {', '.join(row.gate.name for row in missed)}")
    open_ = [result.gate.name for result in results if result.verdict == "not measured"]
    if open_:
        raise NotMeasured(f"{len(open_)} of {len(results)} gates were not measured: {', '.join(open_)}")
    return 0


def _selftest(gates: Sequence[gate.Gate], project: Path) -> int:
    blind = []
    for trial in selftest.trials(gates, project):
        verdict = "noticed" if trial.noticed else "BLIND  "
        print(f"{verdict} {trial.gate.name:<32} {trial.result.outcome.elapsed_s:7.1f} s  {trial.fault}", flush=True)
        if not trial.noticed:
            blind.append(trial.gate.name)
            print(trial.result.outcome.tail(), file=sys.stderr)
    if blind:
        raise GateFailed(f"{len(blind)} of {len(gates)} gates did not notice their violation: {', '.join(blind)}")
    print(f"each of {len(gates)} gates noticed its violation")
    return 0

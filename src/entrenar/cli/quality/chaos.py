"""`entrenar quality chaos [conditions] -- COMMAND`: a command with little memory, a small disk, a slow core, a kill."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from entrenar.errors import ConfigError
from entrenar.memory import parse_bytes
from entrenar.quality.chaos import ChaosConfig, Outcome, run

_PRESETS = {"gentle": ChaosConfig.gentle, "aggressive": ChaosConfig.aggressive}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.epilog = "example: entrenar quality chaos --memory 128MiB --timeout 60 -- entrenar train --config run.toml"
    parser.add_argument("--config", type=Path, metavar="FILE", help="conditions in TOML; flags override them")
    parser.add_argument("--preset", choices=sorted(_PRESETS), help="conditions to start from")
    parser.add_argument("--memory", metavar="SIZE", help="memory that may be added after start-up, such as 128MiB")
    parser.add_argument("--after", metavar="TEXT", help="start-up is over at the first output line with this (any)")
    parser.add_argument("--timeout", type=float, metavar="S", help="wall-clock seconds")
    parser.add_argument("--cpu-share", type=float, metavar="X", help="share of the time that the command runs")
    parser.add_argument("--cpu", type=int, metavar="S", help="seconds of processor time")
    parser.add_argument("--disk", metavar="SIZE", help="size of a disk of its own, at --disk-at")
    parser.add_argument("--disk-at", type=Path, metavar="DIR", help="where the command finds that disk")
    parser.add_argument("--file", metavar="SIZE", help="largest file")
    parser.add_argument("--slow-writes", type=float, metavar="S", help="delay each write (strace)")
    parser.add_argument("--fail-write", type=int, metavar="N", help="let writes fail from number N on (strace)")
    parser.add_argument("--write-error", metavar="NAME", help="EIO (default), ENOSPC, EDQUOT or EINTR")
    parser.add_argument("--signal", metavar="NAME", help="send a signal once, at a random moment")
    parser.add_argument("--within", type=float, metavar="S", help="latest moment of the signal (default: 10)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the moment (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON, and no output of the command")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command to run")
    parser.set_defaults(check=_chaos)


def _chaos(parsed: argparse.Namespace) -> int:
    command = parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command
    if not command:
        raise ConfigError("a command must follow --, such as: entrenar quality chaos --timeout 60 -- python train.py")
    config = _config(parsed)
    outcome = run(config, command, on_line=_pass_over if parsed.json else _show)
    print(json.dumps(asdict(outcome), indent=1) if parsed.json else _line(outcome))
    outcome.demand()
    return 0


def _show(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _pass_over(_: str) -> None:
    """Do nothing."""


def _config(parsed: argparse.Namespace) -> ChaosConfig:
    start = ChaosConfig() if parsed.config is None else ChaosConfig.read(parsed.config)
    values = start.model_dump(exclude_unset=True)
    if parsed.preset is not None:
        values = {**_PRESETS[parsed.preset]().model_dump(exclude_unset=True), **values}
    sizes = {"memory_bytes": parsed.memory, "disk_bytes": parsed.disk, "file_bytes": parsed.file}
    given = {
        "after": parsed.after, "timeout_s": parsed.timeout, "cpu_share": parsed.cpu_share, "cpu_s": parsed.cpu,
        "disk": parsed.disk_at, "slow_write_s": parsed.slow_writes, "fail_write": parsed.fail_write,
        "write_error": parsed.write_error, "signal": parsed.signal, "within_s": parsed.within, "seed": parsed.seed,
        **{name: parse_bytes(text, f"--{name.partition('_')[0]}") for name, text in sizes.items() if text is not None},
    }  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}
    if not values:
        raise ConfigError("no condition is given: name one, such as --memory 128MiB, --timeout 60 or --preset gentle")
    return ChaosConfig.of(values)


def _line(outcome: Outcome) -> str:
    sent = "".join(f", {what} after {when:.1f} s" for when, what in outcome.sent)
    return (
        f"[chaos: {outcome.ending.replace('_', ' ')} after {outcome.seconds:.1f} s with exit code "
        f"{outcome.exit_code}, peak {outcome.peak_bytes / 1e6:,.0f} MB{sent}]"
    )

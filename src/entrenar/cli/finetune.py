"""`entrenar finetune --model DIR --data FILE`: teach a model a task, or resume a run."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from entrenar import planning, recipe
from entrenar.cli import flags
from entrenar.cli.code_inspection import code_inspector
from entrenar.cli.next_step import tell_next
from entrenar.cli.plan import lines, measured
from entrenar.cli.progress import TrainingView, conclusion
from entrenar.cli.ranks import continue_if_restarted, one_of_ranks
from entrenar.cli.train import after_training, describe
from entrenar.config import FinetuneConfig
from entrenar.config_file import load_finetune_config
from entrenar.runs import RunFolder


def run(words: Sequence[str]) -> int:
    """Fine-tune; return the exit code."""
    logging.basicConfig(level=logging.ERROR)
    parsed = flags.parse(_arguments(), words)
    given = flags.given_flags(parsed, FinetuneConfig)
    config = _config(parsed.config, given, is_resuming=parsed.resume)
    continue_if_restarted(parsed, config.run_dir)
    with one_of_ranks(config.train.rank_timeout_s):
        return _finetune(config, parsed, given)


def _finetune(config: FinetuneConfig, parsed: argparse.Namespace, given: dict[str, str]) -> int:
    planned = planning.plan_run(config, recipe.model_folder(config.model)) if parsed.plan else None
    if planned is not None:
        print("\n".join(lines(planned, config)), flush=True)
    inspect_code = code_inspector(parsed.quality_gate)
    view = TrainingView(config.train.epochs, is_compiled=config.train.compile)
    if parsed.resume:
        print("[entrenar: Loading checkpoint...]")
    report = recipe.finetune(
        config,
        resume=parsed.resume,
        overwrite=parsed.overwrite,
        allow_changes=parsed.allow_config_changes,
        adds_time="train.max_time_s" in given,
        observer=replace(view.observer(), inspect_code=inspect_code),
    )
    _print_report(report, config)
    print(measured(planned))
    tell_next(after_training("finetune", report.outcome, report.run_dir))
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "finetune",
        "Teach a model a task from a file of rows.\n\n"
        "  entrenar finetune --model runs/quickstart --data rows.jsonl\n"
        "  entrenar finetune --model DIR --data rows.jsonl --layers top:2 --cache-trunk\n"
        "  entrenar finetune --model DIR --data rows.jsonl --method qlora --precision bfloat16\n"
        "  entrenar finetune --model DIR --data rows.jsonl --method full --lr 5e-5",
    )
    flags.add_run_flags(arguments)
    flags.add_config_flags(arguments, FinetuneConfig)
    return arguments


def _config(file: Path | None, given: dict[str, str], *, is_resuming: bool) -> FinetuneConfig:
    if file is None and is_resuming:
        run_dir = Path(given.get("runs_dir", "runs")) / given.get("name", "finetune")
        return recipe.resumable_finetune_config(run_dir, given)
    return load_finetune_config(file, given)


def _print_report(report: "recipe.FinetuneReport", config: FinetuneConfig) -> None:
    print(f"\n{conclusion(report.outcome)}")
    for when, figures in (("before", report.before), ("after", report.after)):
        if figures is not None:
            task = "" if figures.task is None else f"   {config.task.metric} {figures.task:.1%}"
            tokens = f"token accuracy {figures.token_accuracy:.1%}"
            print(f"  held-out {when:<9}{describe(figures.held_out)}   {tokens}{task}")
    print(f"  {'model' if config.method == 'full' else 'adapter':<18}{report.folder}")
    print(f"  metrics           {RunFolder(report.run_dir).metrics}")

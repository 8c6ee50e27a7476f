"""`entrenar train`: pre-train from a config, or resume a run."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar import planning, recipe
from entrenar.cli import flags
from entrenar.cli.code_inspection import code_inspector
from entrenar.cli.next_step import generate_command, resume_command, tell_next
from entrenar.cli.plan import lines, measured
from entrenar.cli.progress import TrainingView, conclusion
from entrenar.cli.ranks import continue_if_restarted, one_of_ranks
from entrenar.config import RunConfig
from entrenar.config_file import load_config
from entrenar.runs import RunFolder

if TYPE_CHECKING:
    from entrenar.infer import Evaluation
    from entrenar.train import Outcome


def run(words: Sequence[str]) -> int:
    """Train; return the exit code."""
    logging.basicConfig(level=logging.ERROR)
    parsed = flags.parse(_arguments(), words)
    given = flags.given_flags(parsed)
    config = _config(parsed.config, given, is_resuming=parsed.resume)
    if parsed.dry_run:
        return _dry_run(config, parsed)
    continue_if_restarted(parsed, config.run_dir)
    with one_of_ranks(config.train.rank_timeout_s):
        return _train(config, parsed, given)


def _train(config: RunConfig, parsed: argparse.Namespace, given: dict[str, str]) -> int:
    planned = planning.plan_run(planning.sized_for_corpus(config)) if parsed.plan else None
    if planned is not None:
        print("\n".join(lines(planned, config)), flush=True)
    inspect_code = code_inspector(parsed.quality_gate)
    view = TrainingView(config.train.epochs, is_compiled=config.train.compile)
    if parsed.resume:
        print("[entrenar: Loading checkpoint...]")
    report = recipe.train(
        config,
        resume=parsed.resume,
        overwrite=parsed.overwrite,
        allow_changes=parsed.allow_config_changes,
        adds_time="train.max_time_s" in given,
        observer=replace(view.observer(), inspect_code=inspect_code),
    )
    _print_report(report)
    print(measured(planned))
    tell_next(after_training("train", report.outcome, report.run_dir))
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("train", "Pre-train a LLaMA on prepared corpora, or resume a run.")
    flags.add_run_flags(arguments)
    arguments.add_argument("--dry-run", action="store_true", help="check everything and print what would be done")
    flags.add_config_flags(arguments)
    return arguments


def _config(file: Path | None, given: dict[str, str], *, is_resuming: bool) -> RunConfig:
    if file is None and is_resuming:
        run_dir = Path(given.get("runs_dir", "runs")) / given.get("name", "run")
        return recipe.resumable_config(run_dir, given)
    return load_config(file, given)


def _dry_run(config: RunConfig, parsed: argparse.Namespace) -> int:
    config = planning.sized_for_corpus(config)
    model = config.model
    tokens = config.data.batch_size * config.data.seq_len * config.train.grad_accum_steps
    print(f"run          {config.run_dir}")
    print(f"parameters   {model.parameter_count():,}")
    print(f"tokens/step  {tokens:,}")
    print(f"FLOPs/step   {model.flops_per_token(config.data.seq_len) * tokens:.3g}")
    corpora = recipe.check(
        config, resume=parsed.resume, overwrite=parsed.overwrite, allow_changes=parsed.allow_config_changes
    )
    for corpus in corpora:
        counts = "  ".join(f"{name} {split.tokens:,}" for name, split in corpus.manifest.splits.items())
        print(f"corpus       {corpus.folder}: whole; tokens: {counts}")
    if not corpora:
        print(f"corpus       {config.data.corpus[0]}: to be prepared from {', '.join(config.data.sources)}")
    return 0


def _print_report(report: "recipe.TrainReport") -> None:
    print(f"\n{conclusion(report.outcome)}")
    if report.before is not None:
        print(f"  held-out before   {describe(report.before)}")
    if report.after is not None:
        print(f"  held-out after    {describe(report.after)}")
    print(f"  checkpoint        {recipe.model_folder(report.run_dir)}")
    print(f"  metrics           {RunFolder(report.run_dir).metrics}")


def after_training(command: str, outcome: "Outcome", run_dir: Path) -> str:
    """Return what to do next: continue a run that was interrupted, or let the model write."""
    return resume_command(command, run_dir) if outcome.reason == "signal" else generate_command(run_dir)


def describe(evaluation: "Evaluation") -> str:
    """Return loss, perplexity and bits per byte as one line."""
    bits = "" if evaluation.bits_per_byte is None else f"   {evaluation.bits_per_byte:.4f} bits per byte"
    return f"loss {evaluation.loss:.4f}   perplexity {evaluation.perplexity:,.2f}{bits}"

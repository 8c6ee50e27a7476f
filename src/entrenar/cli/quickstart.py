"""`entrenar quickstart`: train a first model in five minutes, and see what it learned."""

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entrenar.cli import flags
from entrenar.cli.progress import TrainingView
from entrenar.recipe.quickstart_config import ENOUGH_STEPS, NUM_STORIES, QuickstartConfig

if TYPE_CHECKING:
    from entrenar.recipe.quickstart import Look, QuickstartReport

_LIVE_CHARACTERS = 300


def run(words: Sequence[str]) -> int:
    """Train and show; return the exit code."""
    logging.basicConfig(level=logging.ERROR)  # the view tells each event once
    config = flags.from_fields(flags.parse(_arguments(), words), QuickstartConfig)
    console = Console(highlight=False, soft_wrap=False)
    subject = "small stories" if config.text is None else str(config.text)
    console.print(f"[bold]A small LLaMA learns {subject}[/bold], {config.minutes:g} minutes of training.\n")
    view = TrainingView(None)

    def on_look(look: "Look") -> None:
        shown = look.texts[0][:_LIVE_CHARACTERS].strip() or "(nothing)"
        kept = (
            ""
            if look.check is None
            else f"; {_share(look.check.keeps_characters, len(look.texts))} keep their characters"
        )
        view.stage(f"  it writes: {shown}{'…' if len(look.texts[0]) > _LIVE_CHARACTERS else ''}{kept}\n")

    from entrenar.recipe.quickstart import quickstart  # noqa: PLC0415  # loads torch

    _show(console, quickstart(config, view.observer(), on_look), config)
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "quickstart",
        f"Train a small LLaMA on {NUM_STORIES:,} stories, or on your own text, and show what it learned.\n"
        "Needs no download, no account and no GPU.",
    )
    flags.add_field_flags(arguments, QuickstartConfig)
    return arguments


def _show(console: Console, report: "QuickstartReport", config: QuickstartConfig) -> None:
    before, after = report.before.texts[0], report.after.texts[0]
    half = max(20, (console.width - 2) // 2)
    console.print()
    console.print(
        Columns(
            [
                Panel(Text(text.strip() or "(nothing)"), title=title, width=half)
                for title, text in (("before training", before[: len(after) + 100]), ("after training", after))
            ],
            padding=(0, 1),
        )
    )
    console.print(_figures(report))
    if report.is_undertrained:
        console.print(
            f"[yellow]Undertrained: {report.outcome.step} of about {ENOUGH_STEPS} steps; this machine is slow or busy. "
            "The first line below continues the run.[/yellow]"
        )
    console.print("\nNext:")
    for command, effect in _next_steps(report, config):
        console.print(Text(f"  {command}"), soft_wrap=True)
        console.print(f"      [dim]{effect}[/dim]")


def _next_steps(report: "QuickstartReport", config: QuickstartConfig) -> list[tuple[str, str]]:
    run_dir, runs_dir = (shlex.quote(str(path)) for path in (report.run_dir, config.runs_dir))
    return [
        (f"entrenar train --config {run_dir}/config.toml --resume --max-time-s 300", "train it longer"),
        (f'entrenar generate {run_dir} --prompt "One windy day" --temperature 0.5', "let it tell another story"),
        (f"entrenar quickstart --text FOLDER --name mine --runs-dir {runs_dir}", "learn your own text instead"),
    ]


def _figures(report: "QuickstartReport") -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    evaluation = report.evaluation
    if evaluation is not None and evaluation.bits_per_byte is not None:
        table.add_row(
            "bits per byte of new text", f"{evaluation.bits_per_byte:.3f}", "the fewer, the better it predicts"
        )
    table.add_row("  gzip -9, the same text", f"{report.gzip_bits_per_byte:.3f}", "finds repeated words only")
    if report.best_bits_per_byte is not None:
        table.add_row("  the stories' own grammar", f"{report.best_bits_per_byte:.3f}", "no model can need fewer")
    if report.after.check is not None:
        count = len(report.after.texts)
        kept, flawless = report.after.check.keeps_characters, report.after.check.is_flawless
        table.add_row("stories that keep their characters", _share(kept, count), f"{_before(report)} before training")
        table.add_row("stories without any slip", _share(flawless, count), "every pronoun, number and promise right")
        table.add_row("stories copied from its text", f"{report.num_known} of {count}", "the others are its own")
    return table


def _before(report: "QuickstartReport") -> str:
    check = report.before.check
    return "" if check is None else _share(check.keeps_characters, len(report.before.texts))


def _share(share: float, count: int) -> str:
    return f"{round(share * count)} of {count}"

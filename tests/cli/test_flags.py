"""Flags say what may stand after them."""

import argparse
import re

import pytest

from entrenar.cli import flags
from entrenar.cli.main import main
from entrenar.config import FinetuneConfig, RunConfig, options


@pytest.mark.parametrize(
    ("flag", "shown"),
    [
        ("--method", "full|lora|qlora"),
        ("--halt-on", "loss_spike,gradient_spike,dead_gradient,plateau,throughput_drop,held_out_rise"),
        ("--stream-base", "true|false"),
        ("--layers", "LAYERS"),  # all, or a text, or numbers: no list of words
        ("--lr", "LR"),
    ],
)
def test_help_shows_choices_where_they_are_words(flag, shown):
    """The choices of a field are what stands after its flag; a field of other kinds shows its name."""
    arguments = argparse.ArgumentParser("entrenar finetune")
    flags.add_config_flags(arguments, FinetuneConfig)
    metavars = {action.option_strings[0]: action.metavar for action in arguments._actions}
    assert metavars[flag] == shown


def test_usage_of_a_command_with_a_hundred_flags_is_a_line():
    """The flags are listed once, with their meaning."""
    arguments = argparse.ArgumentParser("entrenar finetune")
    flags.add_config_flags(arguments, FinetuneConfig)
    assert arguments.format_usage() == "usage: entrenar finetune [--config FILE] [flags]\n"


@pytest.mark.parametrize(("command", "model"), [("train", RunConfig), ("finetune", FinetuneConfig)])
def test_help_is_one_screen_and_help_all_is_everything(command, model, capsys):
    """What a first run needs, and how many options there are besides; every option in the other."""
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([command, "--help-all"]) == 0
    whole = capsys.readouterr().out
    named = {option.flag for option in options(model)}
    shown = {flag for flag in named if re.search(rf"^ +{flag}\b", short, re.MULTILINE)}
    assert len(short.splitlines()) < 80
    assert {"--lr", "--batch-size", "--max-steps"} <= shown
    assert all(re.search(rf"^ +{flag}\b", whole, re.MULTILINE) for flag in named)
    assert f"{len(named - shown)} more options: entrenar {command} --help-all" in " ".join(short.split())


def test_a_hidden_option_is_still_a_flag(capsys):
    """What one screen leaves out is accepted, and its faults are named."""
    assert main(["config", "print", "--muon-momentum", "2"]) == 2
    assert "--muon-momentum" in capsys.readouterr().err

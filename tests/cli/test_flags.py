"""Flags say what may stand after them."""

import argparse

import pytest

from entrenar.cli import flags
from entrenar.config import FinetuneConfig


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

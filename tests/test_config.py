"""Configs: each option is declared once, with its help, its flag, and whether a resumed run may change it."""

import pytest

from entrenar.config import FinetuneConfig, RunConfig, changeable, difference, options
from entrenar.config_file import load_config


def test_differences_are_listed():
    """Two configs are compared option by option."""
    given = {"preset": "tiny", "train.max_steps": "10"}
    changed = load_config(None, given | {"optim.lr": "0.002", "train.seed": "7"})
    assert difference(load_config(None, given), changed) == ["train.seed: 0 -> 7", "optim.lr: 0.0003 -> 0.002"]


@pytest.mark.parametrize("model", [RunConfig, FinetuneConfig])
def test_every_flag_is_unique_and_described(model):
    """No two options share a flag, and each has a docstring for its help."""
    all_options = list(options(model))
    flags = [option.flag for option in all_options]
    assert len(flags) == len(set(flags)), sorted(flag for flag in flags if flags.count(flag) > 1)
    assert [option.key for option in all_options if not option.field.description] == []


@pytest.mark.parametrize("model", [RunConfig, FinetuneConfig])
def test_a_resumed_run_may_change_its_place_its_length_and_what_it_reports(model):
    """Name, folder, limits, intervals and machine may differ; nothing that a step computes may."""
    may = changeable(model)
    assert {"name", "runs_dir", "train.max_steps", "train.epochs", "train.max_time_s", "train.log_every"} <= may
    assert {"train.threads", "train.offload", "train.freed_memory", "checkpoint.save_every"} <= may
    never = {"device", "compute_dtype", "train.seed", "train.precision", "train.grad_accum_steps", "train.compile"}
    assert not may & never
    assert not [key for key in may if key.split(".")[0] in ("optim", "schedule", "monitor", "lora", "quantize")]


def test_an_option_of_both_kinds_of_runs_may_change_in_both_or_in_none():
    """Where pre-training and fine-tuning share an option, they agree on whether it may change."""
    shared = {option.key for option in options(RunConfig)} & {option.key for option in options(FinetuneConfig)}
    assert shared & changeable(RunConfig) == shared & changeable(FinetuneConfig)


def test_the_schema_says_what_may_change():
    """An editor that reads the JSON schema sees the property."""
    schema = RunConfig.model_json_schema()
    assert schema["properties"]["name"]["may_change_on_resume"] is True
    assert "may_change_on_resume" not in schema["properties"]["device"]

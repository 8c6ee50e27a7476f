"""Folders of runs, written by hand."""

import json

import pytest


def record(step: int, **changes):
    """Return a step's record as metrics.jsonl holds it."""
    plain = {"step": step, "loss": 3.0 - step / 100, "lr": 1e-3, "grad_norm": 1.0, "targets": 100 * step,
             "targets_per_s": 500.0, "elapsed_s": 0.2 * step, "eta_s": None, "epoch": None, "held_out": None,
             "phases_s": {"data": 0.001, "forward": 0.08, "backward": 0.11, "optimizer": 0.009}}  # fmt: skip
    return plain | changes


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder from its records, events and config."""

    def make(name: str, records, events=(), config: str = 'name = "a"\n[optim]\nlr = 0.001\n'):
        folder = tmp_path / name
        folder.mkdir()
        for file, rows in (("metrics.jsonl", records), ("events.jsonl", events)):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.toml").write_text(config)
        return folder

    return make

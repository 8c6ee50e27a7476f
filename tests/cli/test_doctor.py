"""The doctor says what is there, and no to a wrong gradient."""

import pytest
import torch

from entrenar import ops
from entrenar.cli.main import main


def test_a_sound_install_passes(capsys):
    """Every gradient check is ok and the exit code is 0."""
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.count("  ok ") == 4
    assert "all well" in said


@pytest.mark.parametrize("op", ["swiglu", "rms_norm", "attention"])
def test_a_planted_wrong_backward_is_found(op, monkeypatch, capsys):
    """An op whose gradient is two per cent off ends with exit code 1 and its name."""
    right = getattr(ops, op)

    def wrong(*arguments, **options):
        value = right(*arguments, **options)
        return value + 0.02 * (value - value.detach())

    monkeypatch.setattr(ops, op, wrong)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "WRONG  derived backward = finite differences" in captured.out
    assert "do not train with this install" in captured.err


def test_the_doctor_leaves_the_threads_alone(capsys):
    """Looking changes nothing."""
    before = torch.get_num_threads()
    main(["doctor"])
    assert torch.get_num_threads() == before

"""The tokens that a model is rounded on come from all over a text, or from the model."""

import pytest
import torch
from torch import nn

from entrenar.errors import DataError
from entrenar.quantize.calibration import InputMoments, calibration_rows

from .conftest import TEXT


def not_asked(*_):
    raise AssertionError("a text was given")


def test_rows_of_a_text_are_spread_over_it(model, tokenizer, text):
    """The first and the last row are the text's beginning and end."""
    ids = tokenizer.encode(TEXT)
    rows = calibration_rows(model, tokenizer, text, not_asked)
    assert rows[0].tolist() == ids[:64]
    assert rows[-1].tolist() == ids[-64:]


def test_without_a_text_the_model_writes_the_rows(model, tokenizer):
    """Each row begins with bos and goes on with what the generator gives it; a row that has ended gets bos again."""

    def count_up(_, rows, count):
        return ([step if row % 2 else None for row in range(len(rows))] for step in range(10, 10 + count))

    rows = calibration_rows(model, tokenizer, None, count_up)
    first = 0 if tokenizer.bos_id is None else tokenizer.bos_id
    assert rows.shape == (32, 64)
    assert rows[0].tolist() == [first] * 64
    assert rows[1].tolist() == [first, *range(10, 73)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", r"must have at least \d+ tokens, got \d+"), (b"\xff\xfe", "cannot be read"), (None, "cannot be read")],
)
def test_a_text_that_cannot_be_used_is_named(model, tokenizer, tmp_path, content, message):
    """Too short, no text at all, or not there."""
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        calibration_rows(model, tokenizer, path, not_asked)


def test_moments_are_summed_over_calls_until_closed():
    """xᵀx of all rows of all inputs, none after close."""
    module = nn.Linear(5, 3)
    moments = InputMoments({"m": module})
    first, second = torch.randn(2, 4, 5), torch.randn(1, 7, 5)
    module(first)
    module(second)
    moments.close()
    module(first)
    rows = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    torch.testing.assert_close(moments.sums["m"], rows.mT @ rows)

"""What of a base is held in few bits is said once, and what would change nothing is refused."""

import pytest
from pydantic import ValidationError

from entrenar.peft import QuantizeConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_turns": 9}, "loftq_turns has no effect without bits; give a budget, or leave it out"),
        ({"calibration": "text.txt"}, "calibration has no effect without bits; give a budget, or leave it out"),
        ({"bits": 4, "head": "int8"}, "bits chooses a width for embedding and head too; leave embedding and head out"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    """The message says what it needs; with a budget it is taken, and what a run wrote down is read back."""
    with pytest.raises(ValidationError, match=message):
        QuantizeConfig.model_validate(options)
    taken = QuantizeConfig.model_validate({key: value for key, value in options.items() if key != "head"} | {"bits": 4})
    for config in (QuantizeConfig(), taken):
        assert QuantizeConfig.model_validate_json(config.model_dump_json()) == config

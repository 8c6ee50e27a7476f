"""Settings are frozen, refuse what they do not know, and every field is a flag of its own with a help text."""

import pytest
from pydantic import ValidationError

from entrenar.train import CheckpointConfig, MonitorConfig, OptimConfig, ScheduleConfig, TrainConfig

MODELS = (TrainConfig, OptimConfig, ScheduleConfig, CheckpointConfig, MonitorConfig)


def _make(model, **fields):
    return model(**({"max_steps": 1} if model is TrainConfig else {}), **fields)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_keys_and_changes_are_refused(model) -> None:
    """A misspelt key is an error with its name, and a config cannot be changed once made."""
    with pytest.raises(ValidationError, match="learning_rat"):
        _make(model, learning_rat=1)
    config = _make(model)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(model.model_fields)), 1)


def test_field_names_are_unique_and_documented() -> None:
    """No two models share a field, and each field has a sentence for the help."""
    names = [name for model in MODELS for name in model.model_fields]
    assert len(names) == len(set(names))
    for model in MODELS:
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name


def test_a_run_needs_an_end() -> None:
    """Without any limit the config is refused, with the names of the limits."""
    with pytest.raises(ValidationError, match="a run needs an end: set max_steps, epochs or max_time_s"):
        TrainConfig()


def test_the_nearest_limit_counts() -> None:
    """Of max_steps and epochs the smaller number of steps wins; time alone gives no number."""
    assert TrainConfig(max_steps=5, epochs=1, grad_accum_steps=2).total_steps(9) == 5
    assert TrainConfig(max_steps=50, epochs=1.5, grad_accum_steps=2).total_steps(9) == 7
    assert TrainConfig(max_time_s=1).total_steps(None) is None


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (OptimConfig, "lr", 0.0),
        (OptimConfig, "beta2", 1.0),
        (TrainConfig, "grad_accum_steps", 0),
        (CheckpointConfig, "keep_last", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(model, field: str, value: float) -> None:
    """A value that breaks its rule is refused with the field's name."""
    with pytest.raises(ValidationError, match=field):
        _make(model, **{field: value})

"""The learning rate climbs, stays and falls as its picture says, for every length of run."""

import inspect
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from entrenar.train import schedule
from entrenar.train.schedule import ScheduleConfig, lr_multiplier

SHAPES = ("cosine", "linear", "constant", "wsd")


def configs() -> st.SearchStrategy[ScheduleConfig]:
    return st.builds(
        ScheduleConfig,
        schedule=st.sampled_from(SHAPES),
        warmup_steps=st.integers(0, 50),
        min_lr_ratio=st.floats(0.0, 1.0),
        wsd_decay_ratio=st.floats(0.01, 1.0),
    )


@pytest.mark.property
@pytest.mark.kills("train.schedule", "(1.0 - config.min_lr_ratio) * shape", "1.0 * shape")
@given(configs(), st.integers(1, 300), st.integers(1, 400))
def test_the_multiplier_is_positive_until_the_end_and_at_most_one(
    config: ScheduleConfig, step: int, total: int
) -> None:
    """Every step has a multiplier in [0, 1], and after the warm-up it is at least `min_lr_ratio`."""
    value = lr_multiplier(config, step, total)
    assert 0.0 <= value <= 1.0
    if step >= config.warmup_steps:
        assert value >= config.min_lr_ratio - 1e-12


@pytest.mark.property
@pytest.mark.kills("train.schedule", "return step / config.warmup_steps", "return (step + 1) / config.warmup_steps")
@given(configs(), st.integers(2, 200))
def test_it_climbs_then_never_rises(config: ScheduleConfig, total: int) -> None:
    """Up to the warm-up's last step it rises strictly; from there on it never does."""
    values = [lr_multiplier(config, step, total) for step in range(1, total + 1)]
    top = max(config.warmup_steps, 1)
    assert all(low < high for low, high in pairwise(values[:top]))
    after = values[top - 1 :]
    assert all(high >= low - 1e-12 for high, low in pairwise(after))


@pytest.mark.property
@pytest.mark.kills(
    "train.schedule",
    "max(0.0, 1.0 - (1.0 - progress) / config.wsd_decay_ratio)",
    "float(progress > 0.5)",
)
@given(configs(), st.integers(200, 2000))
def test_it_has_no_jumps(config: ScheduleConfig, total: int) -> None:
    """Neighbouring steps differ by no more than the steepest of warm-up, cosine and the wsd decay."""
    values = [lr_multiplier(config, step, total) for step in range(1, total + 1)]
    decay_steps = (total - max(config.warmup_steps, 1)) * (config.wsd_decay_ratio if config.schedule == "wsd" else 1.0)
    steepest = max(1.6 / decay_steps, 1.0 / max(config.warmup_steps, 1) if config.warmup_steps else 0.0)
    assert all(abs(a - b) <= steepest + 1e-9 for a, b in pairwise(values))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ends_are_exact(shape: str) -> None:
    """The first full step runs at 1, the last at `min_lr_ratio`, later ones stay there; `constant` stays at 1."""
    config = ScheduleConfig(schedule=shape, warmup_steps=10, min_lr_ratio=0.25)
    last = 1.0 if shape == "constant" else 0.25
    assert lr_multiplier(config, 1, 100) == 0.1
    assert lr_multiplier(config, 10, 100) == 1.0
    assert lr_multiplier(config, 100, 100) == last
    assert lr_multiplier(config, 1000, 100) == last


def test_midpoints_by_hand() -> None:
    """Half-way down, cosine and linear are at half; wsd is still at 1 and is half-way through its last fifth at 0.9."""
    for shape in ("cosine", "linear"):
        assert lr_multiplier(ScheduleConfig(schedule=shape, min_lr_ratio=0.0), 51, 101) == pytest.approx(0.5)
    assert lr_multiplier(ScheduleConfig(schedule="cosine", min_lr_ratio=0.0), 26, 101) == pytest.approx(0.8535533906)
    assert lr_multiplier(ScheduleConfig(schedule="linear", min_lr_ratio=0.0), 26, 101) == pytest.approx(0.75)
    wsd = ScheduleConfig(schedule="wsd", min_lr_ratio=0.0)
    assert lr_multiplier(wsd, 86, 101) == pytest.approx(0.75)
    assert lr_multiplier(wsd, 80, 101) == 1.0
    assert lr_multiplier(wsd, 91, 101) == pytest.approx(0.5)


def test_a_warm_up_longer_than_the_run_only_climbs() -> None:
    """With fewer steps than the warm-up has, each step is still warm-up."""
    config = ScheduleConfig(warmup_steps=100)
    assert [lr_multiplier(config, step, 10) for step in (1, 10)] == [0.01, 0.1]


def test_a_run_of_one_step_trains_at_the_full_rate() -> None:
    """The only step of a run is not the decayed one."""
    assert lr_multiplier(ScheduleConfig(), 1, 1) == 1.0


@pytest.mark.parametrize(
    ("field", "value"), [("schedule", "cubic"), ("warmup_steps", -1), ("min_lr_ratio", 1.5), ("wsd_decay_ratio", 0.0)]
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    """A setting out of range is refused with its name."""
    with pytest.raises(ValidationError, match=field):
        ScheduleConfig(**{field: value})


def test_the_formula_needs_no_torch() -> None:
    """The schedule's own imports are pydantic and math, so a planner can use it without torch."""
    names = {
        line.split()[1] for line in inspect.getsource(schedule).splitlines() if line.startswith(("import ", "from "))
    }
    assert names == {"math", "typing", "pydantic"}

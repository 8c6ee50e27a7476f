"""Config files: every fault at once with its place, flags over files, and what is written is read back."""

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from entrenar.config import FinetuneConfig, Option, RunConfig, difference, options
from entrenar.config_file import load_config, load_finetune_config, to_toml
from entrenar.errors import ConfigError

GOOD = """\
name = "trial"
preset = "tiny"

[optim]
lr = 0.001

[train]
max_steps = 10
"""


def write(tmp_path: Path, text: str, name: str = "run.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path):
    """The file's values hold; all else is the default."""
    config = load_config(write(tmp_path, GOOD))
    assert (config.name, config.optim.lr, config.train.max_steps) == ("trial", 0.001, 10)
    assert config.model.hidden_size == 256
    assert config.optim.beta1 == 0.9


def test_flags_go_over_the_file(tmp_path):
    """A typed flag wins, and the rest of its table stays."""
    config = load_config(write(tmp_path, GOOD), {"optim.lr": "5e-4", "train.tensorboard": "true", "name": "other"})
    assert (config.optim.lr, config.train.tensorboard, config.name) == (5e-4, True, "other")
    assert config.train.max_steps == 10


def test_json_is_read_like_toml(tmp_path):
    """The same settings as JSON give the same config."""
    as_json = json.dumps(
        {"name": "trial", "preset": "tiny", "optim": {"lr": 0.001}, "train": {"max_steps": 10}}, indent=1
    )
    assert load_config(write(tmp_path, as_json, "run.json")) == load_config(write(tmp_path, GOOD))


def test_single_fields_change_a_preset(tmp_path):
    """[model] goes over the preset, field by field."""
    config = load_config(write(tmp_path, GOOD + "\n[model]\nnum_layers = 2\n"))
    assert (config.model.num_layers, config.model.hidden_size) == (2, 256)


def test_all_faults_are_told_at_once_with_their_lines(tmp_path):
    """A negative rate, a misspelt key and a wrong type are one message, each with file and line."""
    path = write(tmp_path, 'name = "x"\n[optim]\nlr = -0.1\nwieght_decay = 0\n[train]\nmax_steps = "many"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert f"optim.lr: must be greater than 0, got -0.1 ({path}, line 3)" in lines
    assert f"optim.wieght_decay is not a setting; did you mean optim.weight_decay? ({path}, line 4)" in lines
    assert any(line.startswith("train.max_steps: must be a valid integer") and "line 6" in line for line in lines)


def test_wrong_types_are_faults_not_conversions(tmp_path):
    """A truth value is no number, infinity no rate, and a name is no way out of runs_dir."""
    text = 'name = ".."\n[train]\nmax_steps = true\n[optim]\nlr = inf\n[data]\nbatch_size = false\n'
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    faults = str(caught.value).splitlines()
    assert len(faults) == 4
    assert "train.max_steps: must be a valid integer" in str(caught.value)
    assert "got 'true'" in str(caught.value)
    assert "optim.lr: must be a finite number, got inf" in str(caught.value)
    assert "name: string should match pattern" in str(caught.value)
    assert load_config(write(tmp_path, "[train]\nmax_steps = 1\ntensorboard = true\n")).train.tensorboard


def test_a_list_flag_takes_commas_even_where_nothing_is_allowed_too(tmp_path):
    """--weights 3,1 means the list, as --corpus a,b does."""
    config = load_config(None, {"data.weights": "3,1", "data.corpus": "a,b"})
    assert (config.data.weights, len(config.data.corpus)) == ((3.0, 1.0), 2)


def test_a_key_in_the_wrong_table_is_told_its_place(tmp_path):
    """A known key under another table is named with its own table."""
    with pytest.raises(ConfigError, match=r"^train\.lr is not a setting; it is optim\.lr \(.*line 3\)"):
        load_config(write(tmp_path, "[train]\nmax_steps = 1\nlr = 1\n"))


def test_a_fault_in_a_flag_names_the_flag():
    """A typed value that breaks a rule is traced to its flag, not to the file."""
    with pytest.raises(ConfigError, match=r"^optim\.lr: must be greater than 0, got '-3' \(flag --lr\)$"):
        load_config(None, {"optim.lr": "-3"})


def test_windows_longer_than_the_context_are_refused(tmp_path):
    """A rule between two tables names both values."""
    with pytest.raises(ConfigError, match=r"data\.seq_len must be <= model\.max_seq_len, got 512 > 256"):
        load_config(write(tmp_path, GOOD + "[data]\nseq_len = 512\n"))


def test_an_unknown_preset_is_refused(tmp_path):
    """The presets there are are listed."""
    with pytest.raises(ConfigError, match=r"^preset: must be 'tiny', '124m'.* got 'huge'"):
        load_config(write(tmp_path, 'preset = "huge"\n[train]\nepochs = 1\n'))


def test_a_run_without_an_end_reads_its_corpus_once(tmp_path):
    """Where none of max_steps, epochs and max_time_s is set, a run is an epoch, whatever else of [train] is set."""
    assert load_config(write(tmp_path, "[train]\nseed = 1\n")).train.epochs == 1
    assert load_config(None, {"train.grad_accum_steps": "2"}).train.epochs == 1
    assert load_config(None, {"train.max_steps": "9"}).train.epochs is None
    assert load_config(write(tmp_path, "[train]\nmax_time_s = 9\n")).train.epochs is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", b"lr = = 3", "is not valid toml"),
        ("run.json", b"[1]", "must hold a table of settings, got list"),
        ("run.json", b"{", "is not valid json"),
        ("run.toml", b"\xff\xfe", "cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    """A broken file is an error that names it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    """A misspelt file name is answered with the nearest file."""
    write(tmp_path, GOOD, "quickstart.toml")
    with pytest.raises(ConfigError, match=r"quikstart\.toml does not exist; did you mean .*quickstart\.toml\?"):
        load_config(tmp_path / "quikstart.toml")


_TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=9)
_NUMBERS = st.one_of(st.integers(0, 9), st.floats(0, 1e9), st.sampled_from([1e-300, 2**62, 1e308])).map(str)


def _values(option: Option) -> st.SearchStrategy[str]:
    """Texts that a flag may have, most of them valid."""
    annotation = option.field.annotation
    kinds = [annotation, *get_args(annotation)]
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return st.sampled_from([*words, ",".join(words)])
    if bool in kinds:
        return st.sampled_from(["true", "false"])
    if get_origin(annotation) is dict:
        return st.just('{"q_proj": 2, "k\\\\.\\"[.]": 3}')
    return st.one_of(_NUMBERS, _TEXTS) if {str, Path, tuple} & {get_origin(k) or k for k in kinds} else _NUMBERS


@pytest.mark.property
@pytest.mark.kills("config_file", 'tables += ["", f"[{name}]", *kept]', 'tables += ["", *kept]')
@pytest.mark.parametrize("kind", ["pretrain", "full", "lora", "qlora"])
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_config_that_is_written_is_read_back(tmp_path_factory, kind: str, data: st.DataObject) -> None:
    """Whatever flags a run is given, its config.toml is read as the same config: with it, every run can be resumed."""
    load = load_config if kind == "pretrain" else load_finetune_config
    known = list(options(RunConfig if kind == "pretrain" else FinetuneConfig))
    given_flags = {} if kind == "pretrain" else {"model": "base", "sft.data": "rows.jsonl"}
    for option in data.draw(st.lists(st.sampled_from(known), max_size=5, unique_by=lambda option: option.key)):
        given_flags[option.key] = data.draw(_values(option), label=option.key)
    if kind != "pretrain":
        given_flags["method"] = kind
    try:
        config = load(None, given_flags)
    except ConfigError:
        reject()
    path = tmp_path_factory.mktemp("run") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    try:
        again = load(path)
    except ConfigError as fault:
        raise AssertionError(f"a config that was written is refused: {fault}") from fault
    assert again.model_dump(exclude={"preset"}) == config.model_dump(exclude={"preset"})
    assert to_toml(again) == to_toml(config)


def test_an_option_without_effect_is_refused(tmp_path):
    """A flag that would do nothing names the setting that it needs, even if it is the default; a file's value too."""
    base = {"model": "base", "sft.data": "rows.jsonl"}
    for flags, message in (
        ({"method": "full", "lora.rank": "8"}, "lora.rank has no effect without method = lora or qlora; set that too"),
        ({"trunk.trunk_dir": "x"}, "trunk.trunk_dir has no effect without cache_trunk = true"),
        ({"optim.muon_momentum": "0.9"}, "optim.muon_momentum has no effect without optimizer = muon"),
        ({"schedule.wsd_decay_ratio": "0.5"}, "schedule.wsd_decay_ratio has no effect without schedule = wsd"),
        ({"train.offload_budget_gb": "3"}, "train.offload_budget_gb has no effect without offload = disk"),
        ({"task.metric": "accuracy"}, "task.metric has no effect without task_data"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_finetune_config(None, base | flags)
    with pytest.raises(ConfigError, match=r"schedule\.wsd_decay_ratio has no effect"):
        load_config(write(tmp_path, "[schedule]\nwsd_decay_ratio = 0.5\n"))


def test_a_length_given_by_hand_is_the_length(tmp_path):
    """A flag for steps or epochs replaces both in the file, any limit replaces the default, and time is one more."""
    base = {"model": "base", "sft.data": "rows.jsonl"}
    assert load_finetune_config(None, base).train.epochs == 3
    by_steps = load_finetune_config(None, base | {"train.max_steps": "30"})
    assert (by_steps.train.max_steps, by_steps.train.epochs) == (30, None)
    path = write(tmp_path, "[train]\nepochs = 3\nmax_time_s = 60\n")
    limits = load_config(path, {"train.max_steps": "30"}).train
    assert (limits.max_steps, limits.epochs, limits.max_time_s) == (30, None, 60)
    both = load_config(path, {"train.max_steps": "30", "train.epochs": "2"}).train
    assert (both.max_steps, both.epochs) == (30, 2)
    assert load_config(path, {"train.max_time_s": "9"}).train.epochs == 3


def test_what_is_printed_is_read_back(tmp_path):
    """The TOML of a config is that config."""
    scaled = GOOD + '[model]\nrope_scaling = { rope_type = "linear", factor = 2.0 }\n'
    config = load_config(write(tmp_path, scaled))
    again = load_config(write(tmp_path, to_toml(config), "again.toml"))
    assert difference(config, again) == ["preset: 'tiny' -> None"]  # its fields are written out
    assert again.model_dump(exclude={"preset"}) == config.model_dump(exclude={"preset"})


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*")), ids=lambda path: path.name)
def test_the_configs_of_the_project_are_valid(path):
    """Every shipped config loads."""
    load_config(path)

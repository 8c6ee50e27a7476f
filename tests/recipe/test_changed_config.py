"""A resumed run may change what its checkpoints can take: a change is advised exactly where it is accepted."""

import json

import pytest

from entrenar import recipe
from entrenar.config import FinetuneConfig, RunConfig, fixed, options
from entrenar.config_file import load_config, load_finetune_config
from entrenar.errors import CheckpointError

from ..small import small_corpus, small_run

ADVICE = "or allow the change (--allow-config-changes)"
# What a checkpoint is nothing without: a table of every such option, with another value for it.
OF_A_RUN = {
    "model.vocab_size": "301", "model.hidden_size": "64", "model.num_layers": "1", "model.num_heads": "2",
    "model.num_kv_heads": "4", "model.head_dim": "16", "model.intermediate_size": "128",
    "model.tie_word_embeddings": "false", "optim.optimizer": "muon", "train.precision": "bfloat16", "train.seed": "1",
    "data.seq_len": "16", "data.weights": "[2.0]",
}  # fmt: skip
OF_A_TUNING = {
    "method": "qlora", "lora.rank": "4", "lora.target_modules": '["q_proj"]', "lora.layers": "top:1",
    "lora.rank_pattern": '{"q_proj": 3}', "lora.use_dora": "true", "lora.modules_to_save": '["norm"]',
    "optim.optimizer": "adamw8bit", "train.precision": "bfloat16", "train.seed": "1", "sft.batch_size": "3",
    "sft.seq_len": "16", "sft.batching": "grouped", "sft.train_on": "all",
}  # fmt: skip
OF_NEITHER = {
    "optim.lr": "0.02", "optim.weight_decay": "0", "optim.grad_clip": "0.5", "data.batch_size": "2",
    "train.grad_accum_steps": "2", "schedule.warmup_steps": "1",
    "model.rope_theta": "5000", "train.checkpointing": "full", "monitor.spike_z": "9",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and the options that made it."""
    folder = tmp_path_factory.mktemp("run")
    made = small_run(small_corpus(folder), folder / "runs", train__max_steps="2")
    recipe.train(load_config(None, made))
    return made


@pytest.fixture(scope="module")
def tuning(run, tmp_path_factory):
    """An adapter of two steps over that run, and the options that made it."""
    folder = tmp_path_factory.mktemp("tuning")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"def {n}", "completion": " return 0"}) + "\n" for n in range(12)))
    made = {
        "model": f"{run['runs_dir']}/first", "sft.data": json.dumps([str(rows)]), "name": "second", "lora.rank": "2",
        "runs_dir": str(folder), "sft.batch_size": "2", "sft.seq_len": "32", "train.max_steps": "2",
        "train.threads": "1", "train.eval_every": "0", "task.sample_answers": "0",
    }  # fmt: skip
    recipe.finetune(load_finetune_config(None, made))
    return made


def test_the_tables_name_every_option_that_is_fixed():
    """An option that is marked and not tried here would be a claim without evidence."""
    kept_for_muon = {"optim.muon_excluded"}
    assert fixed(RunConfig) - kept_for_muon == OF_A_RUN.keys()
    assert fixed(FinetuneConfig) - kept_for_muon == OF_A_TUNING.keys()
    assert not {option.key for option in options(RunConfig) if option.is_fixed and option.may_change}


@pytest.mark.parametrize("key", OF_A_RUN)
def test_what_is_fixed_is_refused_and_nothing_else_is_advised(run, key):
    """With the change allowed or not: the key is named, and the remedy is another run."""
    changed = load_config(None, {**run, key: OF_A_RUN[key]})
    for is_allowed in (False, True):
        with pytest.raises(CheckpointError, match=f"start another run.*its own .*{key}") as refused:
            recipe.train(changed, resume=True, allow_changes=is_allowed)
        assert ADVICE not in str(refused.value)


@pytest.mark.parametrize("key", OF_A_TUNING)
def test_another_adapter_is_refused_and_nothing_else_is_advised(tuning, key):
    """So it is for the adapters of a fine-tuning run."""
    changed = load_finetune_config(None, {**tuning, key: OF_A_TUNING[key]})
    for is_allowed in (False, True):
        with pytest.raises(CheckpointError, match=f"start another run.*its own .*{key}") as refused:
            recipe.finetune(changed, resume=True, allow_changes=is_allowed)
        assert ADVICE not in str(refused.value)


@pytest.mark.parametrize("key", OF_NEITHER)
def test_what_is_advised_is_accepted(run, key):
    """The refusal names the flag, and with it the run goes on."""
    changed = load_config(None, {**run, key: OF_NEITHER[key]})
    with pytest.raises(CheckpointError) as refused:
        recipe.train(changed, resume=True)
    assert str(refused.value).endswith(ADVICE)
    assert key in str(refused.value)
    assert recipe.train(changed, resume=True, allow_changes=True).outcome.step == 2

"""Fine-tuning a model folder on a file of rows: what is learned, what stays, and that a run resumes to the byte."""

import json
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entrenar import recipe
from entrenar.config_file import load_finetune_config, to_toml
from entrenar.data import Tokenizer, train_bpe
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import CheckpointError, ConfigError, DataError
from entrenar.files import sha256_file
from entrenar.infer import ChatConfig, ChatSession
from entrenar.interop import load_model
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import fingerprint, plain_state, quantized_projections
from entrenar.train import latest_good

WORDS = ("cat", "dog", "bird", "fish", "frog", "bear")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model of three small layers with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = train_bpe([f"the opposite of {a} is {b}. " for a in WORDS for b in WORDS] * 2, 320)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2,
        intermediate_size=64, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(folder, model, dict(model.named_parameters()), tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows whose answer is the word that was asked for, written twice."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"say {w} {'so ' * (n % 7)}{n}:", "completion": f" {w} {w}"} for n in range(20) for w in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(base: Path, data: Path, runs: Path, **flags: str):
    """A run of six steps."""
    given = {
        "model": str(base), "sft.data": str(data), "name": "trial", "runs_dir": str(runs), "sft.batch_size": "2",
        "sft.eval_fraction": "0.1", "train.max_steps": "6", "optim.lr": "0.02", "train.eval_every": "0",
        "train.threads": "1", "train.grad_accum_steps": "2", "checkpoint.save_every": "2", "task.sample_answers": "0",
        "compute_dtype": "float32",
    }  # fmt: skip
    return load_finetune_config(None, given | {key.replace("__", "."): value for key, value in flags.items()})


def tensors_of(run_dir: Path) -> dict[str, str]:
    """The hash of every tensor file of the newest checkpoint."""
    folder = latest_good(run_dir / "checkpoints").path
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_fine_tuning_learns_the_held_out_task(base, data, tmp_path, method):
    """Sixty steps: a third of the held-out loss, more right tokens; what was frozen is what it was."""
    flags = {"train__max_steps": "60", "checkpoint__save_every": "0", "method": method, "optim__lr": "0.01"}
    if method != "full":
        flags |= {"lora__target_modules": "q_proj,v_proj,up_proj,down_proj", "lora__modules_to_save": "lm_head"}
    said = []
    report = recipe.finetune(config_for(base, data, tmp_path, **flags), observer=recipe.Observer(on_stage=said.append))
    assert report.before is not None
    assert report.after is not None
    assert report.after.held_out.loss < 0.34 * report.before.held_out.loss
    assert report.after.token_accuracy > report.before.token_accuracy + 0.3
    model, _ = recipe.open_model(report.folder)
    {"lora": check_lora, "qlora": check_qlora, "full": check_full}[method](base, model, report.folder, said)


def check_lora(base, model, folder, said):
    """The base is bit for bit what it was, and the folder an adapter's."""
    assert any("% fewer" in line for line in said)
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    original = dict(load_model(base).named_parameters())
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".adapters." not in name}
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in original)


def check_qlora(base, model, folder, said):
    """The quantized base is the one that the adapter names."""
    assert any("weights in 21 matrices of nf4" in line for line in said)
    base_model = load_model(base, quantize=True)
    assert fingerprint(plain_state(base_model)) == json.loads((folder / "base.json").read_text())["sha256"]
    assert len(list(quantized_projections(model))) == 21


def check_full(base, model, folder, said):
    """All weights were trained."""
    assert any(line.startswith("trained: all") for line in said)
    original = dict(load_model(base).named_parameters())
    assert not torch.equal(dict(model.named_parameters())["model.norm.weight"], original["model.norm.weight"])


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "full"},
        {"lora__lora_dropout": "0.2", "train__precision": "bfloat16"},
        {"lora__lora_init": "pissa", "lora__use_dora": "true"},
        {"lora__lora_init": "pissa", "train__precision": "bfloat16", "lora__modules_to_save": "embed_tokens"},
        {"lora__layers": "top:1", "trunk__cache_trunk": "true", "lora__lora_dropout": "0.1"},
        {"sft__batching": "grouped"},
        {"method": "qlora", "train__precision": "bfloat16", "lora__lora_dropout": "0.2"},
        {"method": "qlora", "lora__layers": "top:1", "trunk__cache_trunk": "true", "train__checkpointing": "full"},
    ],
    ids=lambda flags: ",".join(flags.values()),
)
def test_a_resumed_run_equals_an_uninterrupted_one(base, data, tmp_path, flags):
    """Two steps, a stop, two, a second stop in the middle of an epoch, and two more are six steps, byte for byte."""
    flags = {**flags, "schedule__schedule": "constant"}
    for steps in ("6", "2", "4", "6"):
        name = "whole" if not (tmp_path / "whole").exists() else "parts"
        given = {**flags, "train__max_steps": steps}
        if "trunk__cache_trunk" in flags:
            given["trunk__trunk_dir"] = str(tmp_path / f"{name}-trunk")
        recipe.finetune(config_for(base, data, tmp_path / name, **given), resume=(tmp_path / name).exists())
    whole, parts = (latest_good(tmp_path / name / "trial" / "checkpoints") for name in ("whole", "parts"))
    assert whole.loader_state == parts.loader_state
    assert whole.state["rng"] == parts.state["rng"]
    assert tensors_of(tmp_path / "whole" / "trial") == tensors_of(tmp_path / "parts" / "trial")


def test_a_renamed_run_is_resumed(base, data, tmp_path):
    """A run whose folder was renamed goes on under its new name, and nothing else about it may differ."""
    recipe.finetune(config_for(base, data, tmp_path, train__max_steps="2"))
    (tmp_path / "trial").rename(tmp_path / "renamed")
    report = recipe.finetune(config_for(base, data, tmp_path, train__max_steps="4", name="renamed"), resume=True)
    assert (report.outcome.step, report.run_dir) == (4, tmp_path / "renamed")
    with pytest.raises(CheckpointError, match=r"lora\.rank: 8 -> 4"):
        recipe.finetune(config_for(base, data, tmp_path, name="renamed", lora__rank="4"), resume=True)


def test_a_run_keeps_the_date_that_its_chat_template_was_told(base, tmp_path, monkeypatch):
    """Resumed on another day, it reads the same rows; its config says which day."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "cat"}]
    rows.write_text((json.dumps({"messages": talk}) + "\n") * 8)
    flags = {"sft__eval_fraction": "0", "sft__seq_len": "60"}
    recipe.finetune(config_for(folder, rows, tmp_path, train__max_steps="2", **flags))
    today = date.today().isoformat()
    assert f'template_date = "{today}"' in (tmp_path / "trial" / "config.toml").read_text()

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(sys.modules["entrenar.recipe.finetune"], "date", Tomorrow)
    report = recipe.finetune(config_for(folder, rows, tmp_path, train__max_steps="4", **flags), resume=True)
    assert report.outcome.step == 4
    with pytest.raises(CheckpointError, match="template_date"):
        recipe.finetune(config_for(folder, rows, tmp_path, sft__template_date="2099-01-01", **flags), resume=True)
    with pytest.raises(ConfigError, match="template_date"):
        config_for(folder, rows, tmp_path, sft__template_date="tomorrow")


def test_lora_plus_moves_b_further(base, data, tmp_path):
    """With lora_plus_ratio = 4, the first step moves B four times as far, and A, whose gradient is zero, not at all."""
    moved = {}
    for ratio in ("1", "4"):
        flags = {"lora__lora_plus_ratio": ratio, "train__max_steps": "1", "lora__target_modules": "q_proj"}
        report = recipe.finetune(config_for(base, data, tmp_path / ratio, **flags))
        moved[ratio] = load_file(report.folder / "adapter_model.safetensors")
    for name, tensor in moved["1"].items():
        factor = 4 if "lora_B" in name else 1
        torch.testing.assert_close(moved["4"][name], factor * tensor, rtol=1e-5, atol=0)
        assert tensor.abs().max() > 0


@pytest.mark.chaos
def test_a_killed_run_goes_on_byte_for_byte(base, data, tmp_path):
    """A LoRA run killed by SIGKILL and resumed through the command line ends with the bytes of one that was not."""
    words = ["--model", str(base), "--data", str(data), "--name", "trial", "--runs-dir", str(tmp_path / "killed")]
    words += ["--batch-size", "2", "--max-steps", "30", "--save-every", "2", "--threads", "1", "--eval-every", "0"]
    words += ["--sample-answers", "0", "--keep-best", "false", "--compute-dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-m", "entrenar", "finetune", *words], stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "trial" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_good(checkpoints).step < 30
    resumed = recipe.resumable_finetune_config(tmp_path / "killed" / "trial", {})
    recipe.finetune(resumed, resume=True)
    recipe.finetune(resumed.model_copy(update={"runs_dir": tmp_path / "whole"}))
    assert tensors_of(tmp_path / "killed" / "trial") == tensors_of(tmp_path / "whole" / "trial")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_an_adapter_of_a_run_opens_in_peft(base, data, tmp_path):
    """The checkpoint's folder is PEFT's: peft over transformers gives the logits of our own model with the adapter."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    report = recipe.finetune(config_for(base, data, tmp_path))
    model, _ = recipe.open_model(tmp_path / "trial")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, report.folder)
    ids = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(ids), load_model(base)(ids), atol=1e-3)


def test_the_trunk_cache_trains_the_same_adapter(base, data, tmp_path):
    """With exact rows the cached run and the plain one end alike; the second epoch computes no document again."""
    flags = {
        "lora__layers": "top:1",
        "sft__batching": "padded",
        "train__max_steps": "60",
        "checkpoint__save_every": "0",
    }
    said: list[str] = []
    plain = recipe.finetune(config_for(base, data, tmp_path / "plain", **flags))
    flags |= {"trunk__cache_trunk": "true", "trunk__trunk_rows": "float32", "trunk__trunk_dir": str(tmp_path / "trunk")}
    observer = recipe.Observer(on_stage=said.append)
    cached = recipe.finetune(config_for(base, data, tmp_path / "cached", **flags), observer=observer)
    assert cached.after.held_out.loss == pytest.approx(plain.after.held_out.loss, rel=1e-4)
    assert any("layers 0 … 1 are computed once" in line for line in said)
    ours, theirs = (load_file(report.folder / "adapter_model.safetensors") for report in (cached, plain))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=1e-2)
    recipe.finetune(config_for(base, data, tmp_path / "again", **flags), observer=observer)
    assert any(line.endswith("; 120 are there") for line in said), said


def test_task_and_samples_are_measured_during_training(base, data, tmp_path):
    """Each evaluation records the held-out loss and the task's figure, and shows what the model answers."""
    said: list[str] = []
    records = []
    flags = {"task__task_data": str(data), "task__metric": "accuracy", "task__max_task_examples": "20",
             "task__sample_answers": "1", "train__max_steps": "4", "train__eval_every": "2", "method": "full",
             "optim__lr": "0.01"}  # fmt: skip
    observer = recipe.Observer(on_stage=said.append, on_record=records.append)
    report = recipe.finetune(config_for(base, data, tmp_path, **flags), observer=observer)
    held_out = [record.held_out for record in records if record.held_out is not None]
    assert all(set(figures) == {"loss", "accuracy"} for figures in held_out)
    assert report.after.task == held_out[-1]["accuracy"]
    for begin in ("  asked  … ", "  wanted   ", "  answer → "):
        assert sum(line.startswith(begin) for line in said) == len(held_out)


def test_bad_rows_stop_the_run_before_it_begins_or_are_set_aside(base, data, tmp_path):
    """By default the lines are named; with quarantine the run goes on without them and keeps them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(data.read_text() + '{"prompt": "x", "completion": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:121: completion is empty"):
        recipe.finetune(config_for(base, rows, tmp_path))
    assert not (tmp_path / "trial").exists()
    report = recipe.finetune(config_for(base, rows, tmp_path, sft__bad_rows="quarantine", train__max_steps="1"))
    (line,) = (report.run_dir / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "empty_answer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "full", "lora__rank": "4"}, r"lora\.rank has no effect without method = lora or qlora"),
        ({"method": "full", "trunk__cache_trunk": "true"}, r"trunk\.cache_trunk needs frozen layers"),
        ({"trunk__cache_trunk": "true", "lora__layers": "top:1", "train__compile": "true"}, "cannot be combined"),
        ({"trunk__cache_trunk": "true"}, "a trunk cache needs frozen layers below the adapters"),
        ({"lora__layers": "top:1", "trunk__cache_trunk": "true", "trunk__trunk_budget_gb": "1e-9"}, "trunk_budget_gb"),
        ({"lora__rank": "33"}, "rank must be <= 32, the smaller width of"),
        ({"lora__rank": "0"}, "greater than 0"),
        ({"lora__target_modules": "qproj"}, "no projection is named 'qproj', did you mean q_proj"),
        ({"sft__seq_len": "100"}, r"sft\.seq_len must be <= 64, the model's context, got 100"),
        ({"sft__dat": "x"}, r"sft\.dat is not a setting; did you mean sft\.data"),
        ({"sft__seq_len": "4"}, "no row of .* can be used: 120 too_long"),
        ({"sft__prompt_format": "chat"}, r"sft\.prompt_format = chat needs a tokenizer with a chat_template"),
    ],
)
def test_what_does_not_go_together_is_refused(base, data, tmp_path, flags, message):
    """A wrong combination is an error with its remedy, before anything is trained."""
    place = {"trunk__trunk_dir": str(tmp_path / "trunk")} if "trunk__cache_trunk" in flags else {}
    with pytest.raises((ConfigError, DataError), match=message):
        recipe.finetune(config_for(base, data, tmp_path, **place, **flags))
    assert not (tmp_path / "trial" / "checkpoints").exists()


def test_another_base_and_an_adapter_as_base_are_refused(base, data, tmp_path):
    """A run resumes over the base it began with; an adapter alone is no model to train."""
    recipe.finetune(config_for(base, data, tmp_path, train__max_steps="2"))
    with pytest.raises(ConfigError, match="model must be a whole model, got the adapter"):
        recipe.finetune(config_for(tmp_path / "trial", data, tmp_path, name="second"))
    other, tokenizer = recipe.open_model(base)
    other.model.norm.weight.data.mul_(1.5)
    recipe.write_model_folder(tmp_path / "other", other, dict(other.named_parameters()), tokenizer)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        recipe.finetune(config_for(tmp_path / "other", data, tmp_path), resume=True)


def test_an_adapter_without_a_record_is_opened_over_the_base_that_its_config_names(base, data, tmp_path):
    """PEFT's own key leads to the base where our record is missing; without both the base is asked for."""
    recipe.finetune(config_for(base, data, tmp_path, train__max_steps="2"))
    checkpoint = tmp_path / "trial/checkpoints/step-00000002"
    expected = recipe.open_model(checkpoint)[0].state_dict()
    (checkpoint / "model/base.json").unlink()
    actual = recipe.open_model(checkpoint)[0].state_dict()
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
    config = checkpoint / "model/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(DataError, match="does not name its base"):
        recipe.open_model(checkpoint)


def test_a_changed_config_is_not_resumed_silently(base, data, tmp_path):
    """Another rank than the run began with is refused by name."""
    recipe.finetune(config_for(base, data, tmp_path, train__max_steps="2"))
    with pytest.raises(CheckpointError, match=r"lora\.rank"):
        recipe.finetune(config_for(base, data, tmp_path, lora__rank="4"), resume=True)


def test_rows_are_shortened_to_the_context_unless_their_length_is_set(base, data, tmp_path):
    """The default seq_len gives way to the model's context, and the run's config says so."""
    recipe.finetune(config_for(base, data, tmp_path, train__max_steps="1"))
    assert recipe.resumable_finetune_config(tmp_path / "trial", {}).sft.seq_len == 64


def test_the_config_survives_its_file(base, data, tmp_path):
    """Written as TOML and read again, a config is the same, patterns and lists included."""
    config = config_for(base, data, tmp_path, lora__rank_pattern='{"layers.0.*q_proj": 4}', lora__layers="[0, 2]")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_finetune_config(tmp_path / "config.toml") == config


def test_no_held_out_rows_no_held_out_figures(base, data, tmp_path):
    """With eval_fraction = 0 a run trains on everything and reports no loss it did not measure."""
    report = recipe.finetune(config_for(base, data, tmp_path, sft__eval_fraction="0", train__max_steps="2"))
    assert report.before is None
    assert report.after is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_template_that_was_trained_is_saved(method, base, tmp_path):
    """Over a base without a chat template the run's folder has the one its rows were written by, and chat works."""
    small, own = recipe.open_model(base)
    model = Llama(small.config.model_copy(update={"max_seq_len": 512}))
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(tmp_path / "roomy", model, dict(model.named_parameters()), own)
    rows = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in WORDS] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"method": method, "train__max_steps": "1", "sft__seq_len": "512"}
    recipe.finetune(config_for(tmp_path / "roomy", tmp_path / "rows.json", tmp_path, **flags))
    model, tokenizer = recipe.open_model(tmp_path / "trial")
    with ChatTemplate(tokenizer) as chat:
        session = ChatSession(model, tokenizer, chat, ChatConfig(max_new_tokens=4))
        assert list(session.answer("hello", lambda: None))
        text = chat.render([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert "### Instruction:\nhello\n\n### Response:\n" in text
    assert Tokenizer.load(base).chat_template is None


def test_no_template_is_saved_for_rows_that_are_no_chat(base, tmp_path):
    """Completions are asked for as they are, so a template would ask in words that were never trained."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": " b"}) + "\n" for n in range(40)))
    recipe.finetune(config_for(base, rows, tmp_path, train__max_steps="1"))
    assert recipe.open_model(tmp_path / "trial")[1].chat_template is None

"""A base in few bits, however it is made, is found again by its adapter; LoftQ begins nearer to the plain model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config import FinetuneConfig
from entrenar.config_file import load_finetune_config
from entrenar.data import train_bpe
from entrenar.errors import ConfigError, DataError, FormatError
from entrenar.interop import load_model
from entrenar.interop.hf_peft import identify_base, read_base
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import Int8Weight, NfBitsWeight
from entrenar.peft import kinds_held, quantized_projections
from entrenar.recipe.start import Observer

WORDS = ("cat", "dog", "bird", "fish")
TEXT = " ".join(f"the opposite of {a} is {b}." for a in WORDS for b in WORDS) + " "
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in float32, rows to train on and a text to calibrate on."""
    place = tmp_path_factory.mktemp("quantized")
    tokenizer = train_bpe([TEXT] * 3, 320)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(place / "plain", model, dict(model.named_parameters()), tokenizer)
    (place / "text.txt").write_text(TEXT * 30)
    rows = [{"prompt": f"say {word} {number}:", "completion": f" {word}"} for number in range(10) for word in WORDS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config_for(place: Path, **flags: str) -> FinetuneConfig:
    given = {
        "model": str(place / "plain"), "method": "qlora", "sft.data": str(place / "rows.jsonl"), "name": "run",
        "runs_dir": str(place / "runs"), "train.max_steps": "3", "train.epochs": "9", "optim.lr": "0.01",
        "train.precision": "float32", "compute_dtype": "float32", "train.threads": "1",
        "task.sample_answers": "0", "sft.eval_fraction": "0",
        "lora.target_modules": "q_proj,down_proj",
    }  # fmt: skip
    return load_finetune_config(None, given | flags)


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    return model(IDS)


def started(config: FinetuneConfig) -> tuple[Llama, list[str]]:
    """The model as training begins with it: of a run of no steps, and what it said."""
    said: list[str] = []
    report = recipe.finetune(config, overwrite=True, observer=Observer(on_stage=said.append))
    return recipe.open_model(report.folder)[0], said


@pytest.mark.parametrize("head", [None, "nf4"])
def test_an_adapter_brings_an_embedding_in_int8_along(place, head):
    """The kinds stand in base.json; opened by itself, the adapter quantizes its base to the same hash again."""
    flags = {"quantize.embedding": "int8"} | ({"quantize.head": head} if head else {})
    model, said = started(config_for(place, name=f"int8-{head}", **flags))
    assert isinstance(model.model.embed_tokens.quantized, Int8Weight)
    base = read_base(recipe.model_folder(place / f"runs/int8-{head}"))
    assert base.quantize == {"embedding": "int8", "head": head or "int8"} == kinds_held(model)
    assert any(re.search(r"^base: [0-9,]+ weights in 16 matrices of int8 \(8 bits\), nf4", line) for line in said)


def test_a_run_in_int8_is_the_run_over_its_folder(place):
    """Quantized while loading or converted before, the base has the same bytes and the adapter the same values.

    Not the same bytes: the folder's base is mapped at the alignment of the file, and on some processors (AMD EPYC) the
    last bit of a product depends on it.
    """
    folder = place / "folder-int8"
    words = ["convert", str(place / "plain"), str(folder), "--to", "nf4", "--embedding", "int8"]
    assert main(words) == 0
    adapters, bases = [], []
    for name, flags in (("a", {"quantize.embedding": "int8"}), ("b", {"model": str(folder)})):
        report = recipe.finetune(config_for(place, name=name, **flags))
        adapters.append(load_file(report.folder / "adapter_model.safetensors"))
        bases.append(read_base(report.folder).sha256)
    assert bases[0] == bases[1]
    torch.testing.assert_close(adapters[0], adapters[1], rtol=1e-5, atol=1e-7)


def test_a_damaged_word_on_the_base_is_refused(place, tmp_path):
    """A kind that does not exist is named with its file."""
    (tmp_path / "base.json").write_text(
        json.dumps({"name": None, "dtype": "nf4", "sha256": "0", "quantize": {"head": "q9"}})
    )
    with pytest.raises(FormatError, match=r"base.json must hold name, dtype and sha256 of the base: .*\n?.*head"):
        read_base(tmp_path)
    (tmp_path / "base.json").write_text(json.dumps({"name": None, "dtype": "nf4 torch.int3", "sha256": "0"}))
    with pytest.raises(FormatError, match=r"base.json must hold name, dtype and sha256 of the base: .*int3"):
        read_base(tmp_path)


def test_a_budget_is_rounded_once_and_its_folder_is_the_base(place):
    """`--bits` gives the folder that `convert` would, within the budget; adapter and resume find it again."""
    flags = {"quantize.bits": "4.2", "quantize.calibration": str(place / "text.txt"), "name": "bits"}
    config = config_for(place, **flags)
    model, said = started(config)
    words = ["convert", str(place / "plain"), str(place / "converted"), "--to", "nf-bits", "--bits", "4.2"]
    assert main([*words, "--calibration", str(place / "text.txt")]) == 0
    weights = "model.safetensors"
    assert (place / "runs/bits/base" / weights).read_bytes() == (place / "converted" / weights).read_bytes()
    assert all(isinstance(held.quantized, NfBitsWeight) for _, held in quantized_projections(model))
    assert any(line.startswith("budget        4.") for line in said)
    base = read_base(recipe.model_folder(place / "runs/bits"))
    assert Path(base.name) == place / "runs/bits/base"
    assert base.sha256 == identify_base(load_model(place / "converted")).sha256
    said.clear()
    longer = load_finetune_config(place / "runs/bits/config.toml", {"train.max_steps": "5"})
    report = recipe.finetune(longer, resume=True, observer=Observer(on_stage=said.append))
    assert report.outcome.step == 5
    assert not any("Rounding" in line for line in said)


def test_a_budget_that_cannot_be_met_says_the_least_possible(place):
    """The figure can be met; and a base that is rounded already is not rounded again."""
    with pytest.raises(ConfigError, match=r"--bits must be >= \d\.\d+ for this model, got 1\b") as raised:
        recipe.finetune(config_for(place, name="no", **{"quantize.bits": "1"}))
    least = str(raised.value).split(">= ")[1].split()[0]
    started(config_for(place, name="least", **{"quantize.bits": least}))
    again = {"quantize.bits": "4", "model": str(place / "runs/least/base"), "name": "no"}
    with pytest.raises(ConfigError, match=r"quantize.bits rounds plain weights, and those of .*base are in few bits"):
        recipe.finetune(config_for(place, **again))


@pytest.mark.parametrize("bits", [None, "3.0"])
def test_loftq_begins_nearer_to_the_plain_model(place, bits):
    """The product of each adapted projection is nearer by what the leading directions take; the codes are no other."""
    budget = {} if bits is None else {"quantize.bits": bits, "quantize.calibration": str(place / "text.txt")}
    plain = load_model(place / "plain")
    errors = {}
    for init in ("default", "loftq"):
        flags = budget | {"lora.lora_init": init, "optim.lr": "1e-12", "name": f"{init}-{bits}"}
        model, _ = started(config_for(place, **flags))
        adapted = model.model.layers[0].self_attn.q_proj
        merged = adapted.adapter("default").merged(adapted.weight, torch.float32)
        wanted = plain.model.layers[0].self_attn.q_proj.weight.detach()
        errors[init] = float((merged - wanted).norm() / wanted.norm())
    assert errors["loftq"] < (0.8 if bits is None else 0.7) * errors["default"]
    hashes = {read_base(recipe.model_folder(place / f"runs/{init}-{bits}")).sha256 for init in errors}
    assert len(hashes) == (1 if bits is None else 2)  # a budget is rounded for its adapter


def test_a_resumed_loftq_run_needs_no_second_decomposition(place, monkeypatch):
    """What the adapter began at is in the checkpoint."""
    config = config_for(place, name="resumed", **{"lora.lora_init": "loftq"})
    recipe.finetune(config)
    monkeypatch.setattr("entrenar.peft.layers.leading_factors", lambda *_: pytest.fail("decomposed again"))
    longer = load_finetune_config(place / "runs/resumed/config.toml", {"train.max_steps": "5"})
    assert recipe.finetune(longer, resume=True).outcome.step == 5


def test_loftq_asks_for_the_weights_that_were_quantized(place):
    """A folder in four bits no longer has them, and other methods quantize nothing."""
    assert main(["convert", str(place / "plain"), str(place / "nf4"), "--to", "nf4"]) == 0
    packed = config_for(place, name="no", model=str(place / "nf4"), **{"lora.lora_init": "loftq"})
    with pytest.raises(ConfigError, match=r"lora_init = loftq begins at what quantizing takes away, and needs a base"):
        recipe.finetune(packed)
    with pytest.raises(ConfigError, match=r"lora.lora_init = loftq .* method = lora quantizes nothing"):
        config_for(place, method="lora", **{"lora.lora_init": "loftq"})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # transformers' own
def test_a_loftq_adapter_opens_in_peft_over_our_nf4_base(place, tmp_path):
    """It is a plain adapter whose product is not zero, over the codes of plain NF4."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, _ = started(config_for(place, name="peft", **{"lora.lora_init": "loftq"}))
    assert main(["convert", str(place / "plain"), str(tmp_path / "nf4"), "--to", "nf4", "--dtype", "f32"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    theirs = peft.PeftModel.from_pretrained(base, recipe.model_folder(place / "runs/peft"), is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs.train()(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"method": "lora", "quantize.embedding": "int8"},
            "quantize.embedding has no effect without method = qlora; set",
        ),
        ({"method": "lora", "quantize.bits": "4"}, "quantize.bits has no effect without method = qlora; set that too"),
        ({"quantize.bits": "4", "quantize.embedding": "nf4"}, "bits chooses a width for embedding and head too; leave"),
        (
            {"quantize.bits": "4", "quantize.loftq_turns": "9"},
            "quantize.loftq_turns has no effect without lora_init = loftq",
        ),
        ({"quantize.calibration": "x"}, "calibration has no effect without bits; give a budget, or leave it out"),
        ({"quantize.embedding": "q4"}, "quantize.embedding"),
        ({"quantize.bits": "-1"}, "quantize.bits"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place, flags, message):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_for(place, **flags)


def test_a_budget_that_fails_costs_no_earlier_run(place):
    """A text that is not there is named before `--overwrite` deletes anything."""
    earlier = recipe.finetune(config_for(place, name="kept"))
    config = config_for(place, name="kept", **{"quantize.bits": "4", "quantize.calibration": str(place / "nowhere")})
    with pytest.raises(DataError, match=r"calibration text .*nowhere cannot be read"):
        recipe.finetune(config, overwrite=True)
    assert (earlier.folder / "adapter_model.safetensors").is_file()


def test_adapter_options_that_fail_cost_no_earlier_run(place, monkeypatch):
    """What cannot be trained is named before `--overwrite` deletes anything and before a budget is rounded."""
    assert main(["convert", str(place / "plain"), str(place / "packed"), "--to", "nf4"]) == 0
    earlier = recipe.finetune(config_for(place, name="careful"))
    monkeypatch.setattr("entrenar.recipe.base.round_to_budget", lambda *_: pytest.fail("rounded for nothing"))
    for flags, message in (
        ({"lora.target_modules": "q_proj,nonsense"}, "no projection is named 'nonsense'"),
        ({"lora.rank": "500"}, "rank must be <= "),
        ({"lora.modules_to_save": "nonsense"}, "modules_to_save: no module outside the layers is named 'nonsense'"),
        ({"lora.lora_init": "loftq", "model": str(place / "packed")}, "packed is in few bits already: give the orig"),
        ({"quantize.bits": "4", "lora.rank": "500"}, "rank must be <= "),
        ({"quantize.bits": "4", "lora.modules_to_save": "embed_tokens"}, "model.embed_tokens is held in few bits"),
        ({"quantize.bits": "4", "lora.modules_to_save": "lm_head"}, "lm_head is held in few bits within quantize.bits"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe.finetune(config_for(place, name="careful", **flags), overwrite=True)
        with pytest.raises(ConfigError, match=message):
            recipe.finetune(config_for(place, name="fresh", **flags))
    assert (earlier.folder / "adapter_model.safetensors").is_file()
    assert not (place / "runs/fresh").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("stored", "precision"), [("f32", "bfloat16"), ("bf16", "float32")])
def test_a_changed_base_is_noticed_in_whatever_dtype_it_is_stored(place, tmp_path, method, stored, precision):
    """Trained in another dtype than the folder's, the adapter opens in its own and in float32, until a weight moves."""
    plain = tmp_path / "base"
    assert main(["convert", str(place / "plain"), str(plain), "--to", "hf", "--dtype", stored]) == 0
    flags = {"quantize.embedding": "int8"} if method == "qlora" else {}
    config = config_for(place, name="cast", method=method, model=str(plain), runs_dir=str(tmp_path / "runs"), **flags)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    adapter = recipe.finetune(config).folder
    assert recipe.open_model(adapter)[0].dtype == getattr(torch, precision)
    assert recipe.open_model(adapter, dtype=torch.float32)[0].dtype == torch.float32
    model, tokenizer = recipe.open_model(plain)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] += 1
    recipe.write_model_folder(plain, model, dict(model.named_parameters()), tokenizer)
    for dtype in (None, torch.float32):
        with pytest.raises(FormatError, match="was trained on another base"):
            recipe.open_model(adapter, dtype=dtype)


def test_a_run_within_a_budget_can_be_moved(place, tmp_path):
    """The base that it keeps is found beside its checkpoints, and is refused there if it is another."""
    flags = {"quantize.bits": "4.2", "quantize.calibration": str(place / "text.txt"), "name": "moving"}
    model, _ = started(config_for(place, **flags))
    (place / "runs/moving").rename(tmp_path / "moved")
    torch.testing.assert_close(logits(recipe.open_model(tmp_path / "moved")[0]), logits(model), rtol=0, atol=0)
    assert main(["generate", str(tmp_path / "moved"), "--prompt", "say cat", "--max-new-tokens", "2"]) == 0
    shutil.rmtree(tmp_path / "moved/base")
    with pytest.raises(DataError, match=r"has its base at .*runs/moving/base, which is gone; pass the base to"):
        recipe.open_model(tmp_path / "moved")
    shutil.copytree(place / "plain", tmp_path / "moved/base")
    with pytest.raises(FormatError, match="was trained on another base"):
        recipe.open_model(tmp_path / "moved")


def test_a_run_within_a_budget_goes_on_without_the_model_it_began_with(place, tmp_path):
    """Its rounded base, its tokenizer and what LoftQ began at are all in the run."""
    shutil.copytree(place / "plain", tmp_path / "plain")
    flags = {"quantize.bits": "4.2", "quantize.calibration": str(place / "text.txt"), "lora.lora_init": "loftq"}
    given = {"model": str(tmp_path / "plain"), "runs_dir": str(tmp_path / "runs")}
    recipe.finetune(config_for(place, **given, **flags))
    shutil.rmtree(tmp_path / "plain")
    longer = load_finetune_config(tmp_path / "runs/run/config.toml", {"train.max_steps": "5"})
    assert recipe.finetune(longer, resume=True).outcome.step == 5


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ({}, "in four bits: its own model is BASE converted --to nf4;"),
        ({"quantize.embedding": "int8"}, "in four bits: its own model is BASE converted --to nf4 --embedding int8;"),
        (
            {"quantize.embedding": "int8", "quantize.head": "keep"},
            "in four bits: its own model is BASE converted --to nf4 --embedding int8 --head keep;",
        ),
        ({"quantize.head": "nf4"}, "in four bits: its own model is BASE converted --to nf4 --head nf4;"),
        ({"quantize.bits": "4.2"}, "in a budget of bits: its own model is {base};"),
    ],
)
def test_merging_into_the_original_names_the_model_that_was_trained(place, tmp_path, capsys, flags, advice):
    """What the advice gives is the base that the adapter knows: merged over it, nothing more is said."""
    config = config_for(place, runs_dir=str(tmp_path), **flags | {"train.max_steps": "1"})
    adapter = recipe.finetune(config).folder
    assert main(["merge", str(place / "plain"), str(adapter), str(tmp_path / "merged")]) == 0
    own = tmp_path / "run/base"
    assert f"the adapter was trained over this base {advice.format(base=own)}\n" in capsys.readouterr().out
    if "quantize.bits" not in flags:
        own = tmp_path / "own"
        words = advice.partition("converted ")[2].removesuffix(";").split()
        assert main(["convert", str(place / "plain"), str(own), *words]) == 0
    capsys.readouterr()
    assert main(["merge", str(own), str(adapter), str(tmp_path / "again")]) == 0
    assert "the adapter was trained over" not in capsys.readouterr().out

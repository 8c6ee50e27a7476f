"""QLoRA from folder to merged model: what is quantized stays so, what belongs together finds itself again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config import FinetuneConfig
from entrenar.config_file import load_finetune_config
from entrenar.data import train_bpe
from entrenar.errors import ConfigError, FormatError
from entrenar.interop import is_quantized, load_model
from entrenar.interop.hf_peft import load_adapter
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import quantized_projections

ROOT = Path(__file__).parents[2]
WORDS = ("cat", "dog", "bird", "fish")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in bfloat16, the same in four bits, rows, and an adapter trained over each base."""
    place = tmp_path_factory.mktemp("qlora")
    tokenizer = train_bpe([f"the opposite of {a} is {b}. " for a in WORDS for b in WORDS] * 2, 320)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(torch.bfloat16)
    recipe.write_model_folder(place / "plain", model, dict(model.named_parameters()), tokenizer)
    assert main(["convert", str(place / "plain"), str(place / "nf4"), "--to", "nf4"]) == 0
    rows = [{"prompt": f"say {word} {number}:", "completion": f" {word}"} for number in range(10) for word in WORDS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("plain", "nf4"):
        recipe.finetune(config_for(place, name))
    return {name: place / name for name in ("plain", "nf4", "rows.jsonl", "runs")}


def config_for(place: Path, base: str, **flags: str) -> FinetuneConfig:
    """A run of four steps over one of the bases."""
    given = {
        "model": str(place / base), "method": "qlora", "sft.data": str(place / "rows.jsonl"), "name": f"over-{base}",
        "runs_dir": str(place / "runs"), "train.max_steps": "4", "optim.lr": "0.01", "train.precision": "bfloat16",
        "compute_dtype": "float32", "train.threads": "1", "task.sample_answers": "0", "sft.eval_fraction": "0",
        "lora.target_modules": "q_proj,down_proj",
    }  # fmt: skip
    return load_finetune_config(None, given | flags)


def adapter_of(folders: dict[str, Path], base: str) -> Path:
    return recipe.model_folder(folders["runs"] / f"over-{base}")


def test_a_base_quantized_while_loading_is_the_quantized_folder(folders):
    """Both runs train the same adapter, byte for byte, and know the same base by its hash."""
    plain, packed = (adapter_of(folders, base) for base in ("plain", "nf4"))
    weights = "adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (packed / weights).read_bytes()
    bases = [json.loads((folder / "base.json").read_text()) for folder in (plain, packed)]
    assert [base["dtype"] for base in bases] == ["nf4 torch.bfloat16"] * 2
    assert bases[0]["sha256"] == bases[1]["sha256"]


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_an_adapter_brings_its_base_in_four_bits(folders, base):
    """Opened by itself, the adapter lies over the codes it was trained over, whichever folder they come from."""
    model, _ = recipe.open_model(adapter_of(folders, base))
    assert len(list(quantized_projections(model))) == 14


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # transformers' own
def test_the_adapter_opens_in_peft_over_bitsandbytes_with_the_same_logits(folders, tmp_path):
    """PEFT over transformers' reading of our NF4 folder computes what we do."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(5, 25)[None]
    model, _ = recipe.open_model(adapter_of(folders, "nf4"), dtype=torch.float32)
    assert main(["convert", str(folders["plain"]), str(tmp_path / "wide"), "--to", "nf4", "--dtype", "f32"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    theirs = peft.PeftModel.from_pretrained(base, adapter_of(folders, "nf4"), is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs.train()(ids).logits, rtol=1e-4, atol=1e-5)


def test_merging_over_four_bits_writes_a_plain_model_that_computes_the_same(folders, tmp_path, capsys):
    """`entrenar merge NF4 ADAPTER OUT` widens what it does not merge."""
    out = tmp_path / "merged"
    words = [str(folders["nf4"]), str(adapter_of(folders, "nf4")), str(out), "--dtype", "float32"]
    assert main(["merge", *words]) == 0
    assert "in four bits" not in capsys.readouterr().out
    assert not is_quantized(out)
    ids = torch.arange(5, 25)[None]
    adapted, _ = recipe.open_model(adapter_of(folders, "nf4"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(out)(ids), adapted(ids), rtol=1e-4, atol=1e-5)


def test_merging_into_the_original_says_what_the_adapter_was_trained_over(folders, tmp_path, capsys):
    """The original weights are another base than the four bits: allowed, and said."""
    words = [str(folders["plain"]), str(adapter_of(folders, "plain")), str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0
    assert "the adapter was trained over this base in four bits: its own model is" in capsys.readouterr().out


def test_an_adapter_for_other_codes_is_refused(folders, tmp_path):
    """One changed weight is another base."""
    model = load_model(folders["plain"])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] += 1
    recipe.write_model_folder(
        tmp_path / "other", model, dict(model.named_parameters()), recipe.open_model(folders["plain"])[1]
    )
    other = load_model(tmp_path / "other", quantize=True)
    with pytest.raises(FormatError, match="was trained on another base"):
        load_adapter(adapter_of(folders, "plain"), other)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_refuse_a_base_in_four_bits(folders, method):
    """The way out is named."""
    config = config_for(folders["nf4"].parent, "nf4", name="refused").model_copy(update={"method": method})
    message = f"method must be qlora for the model in four bits at {folders['nf4']}, got {method}; or widen it first"
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe.finetune(config)


def test_the_page_on_qlora_trains_and_its_file_reads_back(folders, tmp_path):
    """The loss falls, read back over the same codes the logits are the very same, merged they are near."""
    script = ROOT / "examples/llama2/finetune_qlora.py"
    words = ["--model", folders["plain"], "--data", folders["rows.jsonl"], "--out", tmp_path / "adapter"]
    done = subprocess.run(
        [sys.executable, script, *words, "--steps", "20", "--lr", "0.02"], capture_output=True, text=True, check=True
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.1
    assert re.search(r"^base: 73,728 weights in 14 \w+ of nf4", done.stdout, re.MULTILINE)
    assert "reads back with logits that differ by 0.0" in done.stdout
    merged = re.search(r"merged into widened weights they differ by ([0-9.e-]+)", done.stdout)
    assert merged is not None
    assert float(merged[1]) < 0.1

"""`entrenar merge` writes a model folder that does what base and adapter do, or nothing and a reason."""

from pathlib import Path

import pytest
import torch

from entrenar.cli.main import main
from entrenar.data import Tokenizer, train_bpe
from entrenar.interop import load_model, save_model
from entrenar.interop.hf_peft import identify_base, load_adapter, save_adapter
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, from_base, set_adapter

CONFIG = LlamaConfig(vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_seq_len=64)
LORA = LoraConfig(rank=2, modules_to_save=("lm_head",))
IDS = torch.arange(12)[None]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base and an adapter for it."""
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    save_model(tmp_path / "base", CONFIG, model.state_dict())
    train_bpe(["some text to train on"] * 3, 270).save(tmp_path / "base")
    from_base(model, LORA, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    save_adapter(tmp_path / "adapter", model, LORA, base=identify_base(model, "base"))
    (tmp_path / "probe.txt").write_text("some text to compare on")
    return tmp_path


def merge(folders: Path, *words: str) -> int:
    return main(["merge", *(str(folders / name) for name in ("base", "adapter", "out")), *words])


@pytest.mark.parametrize("probe", ["random", "text"])
def test_merged_folder_does_what_base_and_adapter_do(
    folders: Path, probe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder loads as a plain model with the adapted logits and the base's tokenizer, and the figures are said."""
    words = ["--probe", str(folders / "probe.txt")] if probe == "text" else ["--probe-tokens", "99"]
    assert merge(folders, *words) == 0
    model = load_model(folders / "base")
    load_adapter(folders / "adapter", model)
    set_adapter(model, "default")
    merged = load_model(folders / "out")
    torch.testing.assert_close(merged(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert Tokenizer.load(folders / "out").hash == Tokenizer.load(folders / "base").hash
    tokens = len(Tokenizer.load(folders / "base").encode("some text to compare on")) if probe == "text" else 64
    said = capsys.readouterr().out
    assert f"over {tokens} tokens" in said
    assert "same next token:                             100.0 %" in said


def test_dtype_is_chosen_and_its_rounding_shown(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dtype bfloat16 writes bfloat16 and reports a difference that float32 does not have."""
    figures = []
    for dtype in ("float32", "bfloat16"):
        assert merge(folders, "--dtype", dtype, "--overwrite") == 0
        figures.append(float(capsys.readouterr().out.splitlines()[1].split(": ")[1].split()[0]))
    assert load_model(folders / "out").head_weight.dtype == torch.bfloat16
    assert figures[0] < 1e-5 < figures[1]


def test_refusal_writes_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above --refuse-if the exit code is 1 and there is no folder."""
    assert merge(folders, "--dtype", "bfloat16", "--refuse-if", "1e-9") == 1
    assert "GateFailed: merging moved a logit by" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_another_base_is_refused_unless_wanted(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base of other weights needs --other-base."""
    model = load_model(folders / "base")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(folders / "base", CONFIG, model.state_dict())
    assert merge(folders) == 2
    said = capsys.readouterr().err
    assert "was trained on another base: base with sha256" in said
    assert "merge --other-base" in said
    assert merge(folders, "--other-base") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probe-tokens", "0"], "--probe-tokens must be > 0, got 0"),
        (["--probe", "nowhere"], "--probe nowhere cannot be read as text"),
        (["--probe", "/dev/null"], "--probe /dev/null holds no token"),
    ],
)
def test_unusable_probe_is_refused(
    folders: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe that is missing or empty measures nothing."""
    assert merge(folders, *words) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing OUT needs --overwrite, and neither BASE nor ADAPTER can be OUT."""
    assert merge(folders) == 0
    assert merge(folders) == 2
    assert "exists already; give --overwrite or another folder" in capsys.readouterr().err
    base = str(folders / "base")
    assert main(["merge", base, str(folders / "adapter"), base, "--overwrite"]) == 2
    assert "OUT must be another folder than BASE and ADAPTER" in capsys.readouterr().err


def test_an_adapter_may_be_named_by_its_checkpoint(folders: Path) -> None:
    """As with every other command, the folder that holds the adapter's `model` folder will do."""
    (folders / "checkpoint").mkdir()
    (folders / "adapter").rename(folders / "checkpoint" / "model")
    (folders / "checkpoint").rename(folders / "adapter")
    assert merge(folders) == 0
    assert (folders / "out" / "model.safetensors").is_file()

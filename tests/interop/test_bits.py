"""Folders of mixed widths read back as they were rounded, meet their budget, and foreign numbers are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrenar.cli.main import main
from entrenar.data import train_bpe
from entrenar.errors import ConfigError, DataError, FormatError, GateFailed
from entrenar.interop import bits, hf, quantized_layout
from entrenar.interop.convert import Target, convert
from entrenar.interop.proof import bounds
from entrenar.interop.proof.read_hf import read_hf_folder
from entrenar.interop.source import Source, open_source
from entrenar.ops import NfBitsWeight
from entrenar.peft import LoraConfig, QuantizeConfig, find_targets, quantized_projections, widen
from entrenar.peft.layers import leading_factors
from entrenar.quantize import Adapters, calibration_rows
from entrenar.recipe.bit_budget import continue_rows, round_to_budget

TEXT = "the cat sat on the mat and the dog lay by the door while it rained all day long " * 60
Q = "model.layers.0.self_attn.q_proj.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDE = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 76}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 280)


@pytest.fixture
def source(make_model, tokenizer) -> Source:
    return Source(make_model(vocab_size=300, tie_word_embeddings=False, **WIDE), tokenizer, "hf")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def folder(source, text, tmp_path) -> Path:
    rounded, _ = round_to_budget(source, 4.2, text, lambda _: None)
    convert(rounded, Target(tmp_path / "out", "nf-bits"))
    return tmp_path / "out"


def silent(_: str) -> None:
    pass


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values["quantization_config"] |= changes
    path.write_text(json.dumps(values))


def announced(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_folder_reads_back_as_it_was_rounded(make_model, tokenizer, text, tmp_path, input_ids, is_tied):
    """Logits of the loaded folder are those of the rounded model bit for bit, and its bits meet the budget."""
    model = make_model(vocab_size=300, tie_word_embeddings=is_tied, **WIDE)
    rounded, budget = round_to_budget(Source(model, tokenizer, "hf"), 4.2, text, silent)
    report = convert(rounded, Target(tmp_path / "out", "nf-bits"))
    loaded = hf.load_model(tmp_path / "out")
    assert rounded.rounded is not None
    with torch.no_grad():
        assert torch.equal(loaded(input_ids), rounded.rounded.model(input_ids))
        assert not torch.equal(loaded(input_ids), model(input_ids))  # the source is left as it was
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert 8 * sum(tensor.nbytes for tensor in tensors) / budget.numbers == budget.bits <= 4.2
    assert budget.numbers == sum(parameter.numel() for parameter in model.parameters())
    assert set(budget.widths) == {n for n, p in model.named_modules() if getattr(p, "weight", torch.ones(1)).ndim == 2}
    assert 0 < report.kl < 0.1


@pytest.mark.parametrize("key", ["embedding", "head"])
def test_what_a_budget_chose_is_not_held_otherwise(folder, key):
    """Asking for another kind than the folder has is refused, and the message says which it has."""
    message = rf"quantize\.{key} is int8, but .*out holds it as nf-bits already; leave it out"
    with pytest.raises(ConfigError, match=message):
        hf.load_model(folder, quantize=True, held=QuantizeConfig(**{key: "int8"}))


def test_the_numpy_reader_agrees_with_the_weights_in_use(folder, source):
    """Bits, scales and tops, read without torch, are the numbers that the model multiplies by."""
    model = hf.load_model(folder)
    widen(model)
    written = read_hf_folder(folder)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(written.weight(name)[:]), weight.detach(), rtol=1e-6, atol=0)


def test_a_damaged_scale_is_found_before_the_folder_gets_its_name(source, text, tmp_path, monkeypatch):
    """A number beyond what the rounding did to it fails the conversion, and nothing is left."""
    rounded, _ = round_to_budget(source, 4.2, text, silent)
    pack = bits.pack

    def damaged(name: str, weight: NfBitsWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = pack(name, weight, dtype)
        if name == Q:
            tensors[f"{Q}.scales"] = tensors[f"{Q}.scales"].roll(1, 0)
        return tensors

    monkeypatch.setattr(quantized_layout, "_PACK", {NfBitsWeight.kind: damaged})
    with pytest.raises(GateFailed, match=f"{Q} differs by .* more than its rounding"):
        convert(rounded, Target(tmp_path / "out", "nf-bits"))
    assert not (tmp_path / "out").exists()


def test_the_bound_of_a_rounded_model_allows_what_its_rounding_did_and_no_more(source, text):
    """Norms may not change at all, matrices by their own bounds."""
    rounded, _ = round_to_budget(source, 4.2, text, silent)
    assert rounded.rounded is not None
    model, weight = rounded.rounded.model, source.model.get_parameter(Q).detach()
    bound = bounds.bound_of_rounded(model)
    allowed = bound(Q, weight)(slice(2, 9))
    widen(model)
    torch.testing.assert_close(allowed, (model.get_parameter(Q) - weight).abs()[2:9], rtol=1e-5, atol=1e-6)
    assert not bound("model.norm.weight", torch.ones(64))(slice(0, 3)).any()


def test_a_base_made_for_adapters_leaves_more_to_embedding_and_head(source, text):
    """What adapters make up for needs fewer bits, and the sum of both is nearer to the weight than the codes alone."""
    ranks = dict.fromkeys(find_targets(source.model, LoraConfig(target_modules=PROJECTIONS)), 8)
    plain = source.model.get_parameter(Q).detach()
    outside, left = [], []
    for adapters in (Adapters({}, 0), Adapters(ranks, 1), Adapters(ranks, 6)):
        rounded, budget = round_to_budget(source, 4.4, text, silent, adapters)
        assert budget.bits <= 4.4
        outside.append(budget.widths["model.embed_tokens"] + budget.widths["lm_head"])
        held = dict(quantized_projections(rounded.rounded.model))[Q.removesuffix(".weight")].quantized
        error = plain - held.dequantize()
        lora_a, lora_b = leading_factors(error, 8)
        left.append(float((error - lora_b @ lora_a).norm()))
    assert outside[1] == outside[2] > outside[0], outside
    assert left[2] < 0.95 * left[1]


@pytest.mark.parametrize("name", ["model.embed_tokens", Q.removesuffix(".weight")])
def test_a_weight_that_is_not_finite_is_named_before_any_is_rounded(source, text, name):
    """Also where it would make every estimate NaN."""
    with torch.no_grad():
        source.model.get_submodule(name).weight[3, 5] = torch.nan
    with pytest.raises(DataError, match=rf"^{name}.weight must be finite to be quantized, got NaN"):
        round_to_budget(source, 4.2, text, silent)


def test_without_a_text_the_model_writes_its_own(source):
    """Rows of the wanted shape, all of them the model's tokens, the same each time."""
    rows = calibration_rows(source.model, source.tokenizer, None, continue_rows)
    assert rows.shape == (32, 64)
    assert int(rows.max()) < 300
    assert torch.equal(rows, calibration_rows(source.model, source.tokenizer, None, continue_rows))


def test_a_model_without_a_tokenizer_cannot_be_calibrated(source):
    """The message names the flag that brings one."""
    with pytest.raises(DataError, match=r"needs a tokenizer .*--tokenizer"):
        round_to_budget(Source(source.model, None, "hf"), 4.0, None, silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"block_size": 32}, "block_size must be 64, got 32"),
        ({"levels": None}, "levels must be a table"),
        ({"levels": {}}, "levels must be a table"),
        ({"matrices": None}, "matrices must be a table by name, got None"),
        ({"matrices": {}}, "matrices lacks lm_head, which is held in few bits"),
        ({"levels": {"4": [0.0] * 16}}, "levels of 4 bits are another table"),
        ({"levels": {"4": ["a"] * 16}}, "levels of 4 bits are another table"),
        ({"levels": {"9": [0.0]}}, "levels of 9 bits are another table"),
        ({"quant_method": "gptq"}, "quant_method must be 'bitsandbytes', got 'gptq'"),
    ],
)
def test_other_versions_and_code_books_are_refused(folder, changes, message):
    """The message names file and key."""
    edit(folder / "config.json", **changes)
    with pytest.raises(FormatError, match=message):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"bits": 9, "shape": [64, 64]},
            r"q_proj must have bits, one of [2-8, ]+, and a shape of two numb",
        ),
        ({"bits": "4", "shape": [64, 64]}, "q_proj must have bits, one of"),
        ({"bits": 4, "shape": [64]}, "q_proj must have bits, one of"),
        (4, "q_proj must have bits, one of .* got 4"),
        ({"bits": 4, "shape": [64, 63]}, r"q_proj has shape \(64, 63\), the rest of the file asks for \(64, 64\)"),
        ({"bits": 4, "shape": [63, 64]}, r"q_proj has shape \(63, 64\), the rest of the file asks for \(64, 64\)"),
    ],
)
def test_a_matrix_must_be_announced_as_it_is(folder, said, message):
    """Width and shape of `config.json` are checked before a code is read, and so is which matrices there are."""
    config = announced(folder)
    matrices, name = config["matrices"], Q.removesuffix(".weight")
    edit(folder / "config.json", matrices=matrices | {name: said})
    with pytest.raises(FormatError, match=message):
        hf.load_model(folder)
    other = next(int(bits) for bits in config["levels"] if int(bits) != matrices[name]["bits"])
    edit(folder / "config.json", matrices=matrices | {name: {"bits": other, "shape": [64, 64]}})
    with pytest.raises(FormatError, match=rf"says that .*q_proj has {other} bits and shape \(64, 64\), its codes"):
        hf.load_model(folder)
    edit(folder / "config.json", matrices=matrices | {"model.nowhere": matrices[name]})
    with pytest.raises(FormatError, match=r"matrices has model\.nowhere, which is not there"):
        hf.load_model(folder)


def test_a_matrix_of_another_layout_in_the_folder_is_refused(folder):
    """A matrix that is not announced and lies there as int8 is named."""
    config, name = announced(folder), Q.removesuffix(".weight")
    edit(folder / "config.json", matrices={key: said for key, said in config["matrices"].items() if key != name})
    int8 = {Q: torch.ones(64, 64, dtype=torch.int8), f"{Q}.row_absmax": torch.ones(64)}
    rewrite(folder, **int8, **{f"{Q}.scales": None, f"{Q}.tops": None})
    with pytest.raises(FormatError, match=rf"matrices lacks {name}, which is held in few bits"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (".scales", lambda t: t[:-1], "scales must hold torch.int8 of shape"),
        (".tops", lambda t: t[:, :0], "tops must hold torch.float32 of shape"),
        (".tops", lambda t: t.half(), "tops must hold torch.float32 of shape"),
        ("", lambda t: t[:, :, :-1].contiguous(), r"its codes \(64, \d, 7\) are of another weight"),
        ("", lambda t: t[:, :1].contiguous(), r"its codes \(64, 1, 8\) are of another weight"),
        ("", lambda t: t.flatten(), r"its codes \(\d+,\) are of another weight"),
        ("", lambda t: t.view(torch.int8), "must hold torch.uint8 of shape"),
        (".tops", lambda _: None, "lacks its tops"),
        ("", lambda _: None, "q_proj.weight is missing, of it there is only scales, tops"),
    ],
)
def test_truncated_parts_are_refused(folder, part, change, message):
    """The message names the tensor, what it must be and what it is."""
    name = f"{Q}{part}"
    rewrite(folder, **{name: change(load_file(folder / "model.safetensors")[name])})
    with pytest.raises(FormatError, match=message):
        hf.load_model(folder)


def test_a_tied_head_in_the_file_of_a_quantized_embedding_is_refused(make_model, tokenizer, text, tmp_path):
    """One of the two would be ignored in silence."""
    model = make_model(vocab_size=300, tie_word_embeddings=True, **WIDE)
    rounded, _ = round_to_budget(Source(model, tokenizer, "hf"), 5.0, text, silent)
    convert(rounded, Target(tmp_path / "out", "nf-bits"))
    rewrite(tmp_path / "out", **{"lm_head.weight": torch.zeros(300, 64)})
    with pytest.raises(FormatError, match="ties it to an embedding that is quantized"):
        hf.load_model(tmp_path / "out")


def test_the_command_writes_a_folder_that_opens_and_converts_back(source, text, tmp_path, capsys):
    """Its report says bits and widths; the folder converts to plain weights."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    plain.mkdir()
    hf.save_model(plain, source.model.config, dict(source.model.named_parameters()))
    source.tokenizer.save(plain)
    words = ["convert", str(plain), str(out), "--to", "nf-bits", "--bits", "4.2", "--calibration", str(text)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "bits a weight" in said
    assert "expected to rise by" in said
    back = open_source(out)
    assert back.model.get_parameter(Q).shape == (64, 64)
    assert main(["convert", str(out), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "hf", "--bits", "4"], "--bits is the budget of --to nf-bits, got --to hf"),
        (["--to", "nf4", "--calibration", "x"], "--calibration has no effect without --bits"),
        (["--to", "nf-bits", "--bits", "4", "--dtype", "f32"], "--dtype and --bits exclude each other"),
        (["--to", "nf-bits"], "--to nf-bits needs --bits, the budget of bits a weight"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, message):
    """Nothing is read before the flags are right."""
    (tmp_path / "config.json").write_text("{}")
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err

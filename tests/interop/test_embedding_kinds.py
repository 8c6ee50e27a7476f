"""Embedding and head in few bits are written, proved, read back and identified; what contradicts is refused."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrenar.cli.main import main
from entrenar.errors import ConfigError, DataError, FormatError, GateFailed
from entrenar.interop import convert as convert_module
from entrenar.interop import hf
from entrenar.interop.convert import Target, convert
from entrenar.interop.hf_peft import identify_base
from entrenar.interop.source import Source, open_source
from entrenar.ops import Int8Weight, Nf4Weight, quantize_int8, quantize_nf4
from entrenar.peft import QuantizeConfig, kinds_held, widen

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(20)[None] % 61
QUANTIZE = {"int8": quantize_int8, "nf4": quantize_nf4}


@pytest.fixture
def source(tmp_path, make_model) -> Path:
    """A plain folder of an untied model."""
    return saved(tmp_path / "plain", make_model(tie_word_embeddings=False))


def saved(folder: Path, model) -> Path:
    folder.mkdir()
    hf.save_model(folder, model.config, dict(model.named_parameters()))
    return folder


def written(source: Path, folder: Path, **held: str) -> Path:
    convert(open_source(source, is_streamed=True), Target(folder, "nf4", held=QuantizeConfig(**held)))
    return folder


@torch.no_grad()
def logits(folder: Path, **options: object) -> torch.Tensor:
    return hf.load_model(folder, **options)(IDS)


def announced(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("held", [("int8", None), ("nf4", None), ("keep", "int8"), ("int8", "nf4"), ("nf4", "keep")])
def test_a_folder_is_what_loading_quantizes(tmp_path, source, held):
    """Folder and memory hold the same base, whose embedding and head are those of the plain file, quantized."""
    config = QuantizeConfig(embedding=held[0], head=held[1])
    folder = written(source, tmp_path / "few", embedding=held[0], **({"head": held[1]} if held[1] else {}))
    packed, straight = hf.load_model(folder), hf.load_model(source, quantize=True, held=config)
    assert identify_base(packed) == identify_base(straight)
    kinds = {"embedding": held[0], "head": held[1] or held[0]}
    assert kinds_held(packed) == kinds_held(straight) == kinds
    plain = load_file(source / "model.safetensors")
    for module, kind, name in ((packed.model.embed_tokens, held[0], EMBEDDING), (packed.lm_head, kinds["head"], HEAD)):
        if kind == "keep":
            assert torch.equal(module.weight, plain[name])
        else:
            assert isinstance(module.quantized, {"int8": Int8Weight, "nf4": Nf4Weight}[kind])
            assert torch.equal(module.quantized.codes, QUANTIZE[kind](plain[name]).codes)
    assert torch.equal(logits(folder), logits(source, quantize=True, held=config))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_tied_head_is_its_embedding(tmp_path, make_model, kind):
    """One weight is written, and read by both, also where the source holds it twice."""
    source = saved(tmp_path / "plain", make_model(tie_word_embeddings=True))
    folder = written(source, tmp_path / "few", embedding=kind)
    assert not any(name.startswith("lm_head") for name in load_file(folder / "model.safetensors"))
    assert kinds_held(hf.load_model(folder)) == {"embedding": kind}
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, source / "model.safetensors")
    assert torch.equal(logits(source, quantize=True, held=QuantizeConfig(embedding=kind)), logits(folder))
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, source / "model.safetensors")
    with pytest.raises(FormatError, match=r"lm_head.weight differs from the embedding, but config.json ties them"):
        hf.load_model(source, quantize=True, held=QuantizeConfig(embedding=kind))
    with pytest.raises(ConfigError, match=r"quantize.head must be left out for this model, .* got keep beside"):
        hf.load_model(source, quantize=True, held=QuantizeConfig(embedding=kind, head="keep"))
    tensors = load_file(folder / "model.safetensors")
    twice = {f"{HEAD}{name.removeprefix(EMBEDDING)}": t for name, t in tensors.items() if name.startswith(EMBEDDING)}
    save_file(tensors | {name: tensor.clone() for name, tensor in twice.items()}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=rf"{HEAD} cannot be quantized, but the folder also holds its "):
        hf.load_model(folder)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_loss_and_gradients_are_those_of_the_widened_model(source, kind):
    """Nothing else is computed than what the codes stand for."""
    few = hf.load_model(source, quantize=True, held=QuantizeConfig(embedding=kind))
    wide = hf.load_model(source, quantize=True, held=QuantizeConfig(embedding=kind))
    widen(wide)
    found = [(model.loss(IDS, IDS.roll(-1)), model) for model in (few, wide)]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for loss, model in found:
        loss.backward()
        assert model.model.norm.weight.grad is not None
    torch.testing.assert_close(few.model.norm.weight.grad, wide.model.norm.weight.grad, rtol=1e-4, atol=1e-5)


def test_the_folder_is_smaller_by_what_embedding_and_head_were(tmp_path, source):
    """A byte a number and four a row for int8, a little more than half of that for NF4."""
    sizes = {}
    for kind in ("keep", "int8", "nf4"):
        tensors = load_file(written(source, tmp_path / kind, embedding=kind) / "model.safetensors")
        sizes[kind] = sum(t.nbytes for name, t in tensors.items() if name.startswith((EMBEDDING, HEAD)))
    assert sizes["keep"] == 2 * 97 * 32 * 4
    assert sizes["int8"] == 2 * 97 * (32 + 4)
    assert 2 * 97 * 32 // 2 < sizes["nf4"] < 2 * 97 * 32 // 2 + 2 * 1500


def test_a_base_that_is_nf4_already_gets_the_rest_quantized_while_it_is_read(tmp_path, source):
    """The projections stay as they are in the folder, the embedding is quantized from its plain numbers."""
    packed, config = written(source, tmp_path / "nf4"), QuantizeConfig(embedding="int8")
    assert torch.equal(logits(packed, quantize=True, held=config), logits(source, quantize=True, held=config))
    few = written(source, tmp_path / "few", embedding="int8")
    with pytest.raises(ConfigError, match=r"quantize.embedding is nf4, but .*few holds it as int8 already; leave it"):
        hf.load_model(few, quantize=True, held=QuantizeConfig(embedding="nf4"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_in_nf4_is_read_by_transformers(tmp_path, make_model):
    """What bitsandbytes has a layout for is written in it; the rest names itself so that it is refused there."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
    source = saved(tmp_path / "wide", make_model(tie_word_embeddings=False, **sizes))
    theirs = written(source, tmp_path / "head", head="nf4")
    assert announced(theirs)["quant_method"] == "bitsandbytes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(theirs).train()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(theirs), rtol=1e-5, atol=1e-6)
    ours = written(source, tmp_path / "int8", embedding="int8")
    assert announced(ours)["quant_method"] == "entrenar-nf4"
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "quantization_config.version must be 1, got 2; read are plain weights"),
        ({"projections": "fp4"}, "quantization_config.projections must be 'nf4', got 'fp4'"),
        ({"embedding": "nf4"}, f"quantization_config.embedding is 'nf4', but {EMBEDDING} is held as int8; quantize"),
        ({"head": "keep"}, f"quantization_config.head is 'keep', but {HEAD} is held as int8; quantize the original"),
    ],
)
def test_another_version_or_kind_than_announced_is_refused(tmp_path, source, changes, message):
    """The message names file, key, and what was found."""
    folder = written(source, tmp_path / "few", embedding="int8")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=re.escape(message)):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("method", "part", "name"),
    [
        ("bitsandbytes", "row_absmax", EMBEDDING),
        ("entrenar-nf4", "row_absmax", "model.layers.0.self_attn.q_proj.weight"),
        ("entrenar-nf4", "scales", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_what_the_announced_method_does_not_have_is_refused(tmp_path, source, method, part, name):
    """Int8 where bitsandbytes is announced, or a projection in another layout, is what no other reader reads."""
    folder = written(source, tmp_path / "few", embedding="int8", head="keep")
    values = json.loads((folder / "config.json").read_text())
    theirs = {"quant_method": method, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    values["quantization_config"] |= theirs
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{name}.{part}": torch.ones(97)}, folder / "model.safetensors")
    message = f"quantization_config.quant_method is '{method}', which has no {part} of {name}, but the file has"
    with pytest.raises(FormatError, match=re.escape(message)):
        hf.load_model(folder)


BAD = {
    "truncated scales": (lambda t: t.update({f"{HEAD}.row_absmax": t[f"{HEAD}.row_absmax"][:-1].clone()}),
                         "row_absmax must hold 97 of torch.float32, got 96 of torch.float32"),
    "no codes": (lambda t: t.update({f"{HEAD}.absmax": t.pop(HEAD)}),
                 "is missing, of it there is only absmax, row_absmax"),
    "no scales": (lambda t: t.pop(f"{HEAD}.row_absmax"), "holds codes (torch.int8), but lacks its row_absmax"),
    "bytes": (lambda t: t.update({HEAD: t[HEAD].view(torch.uint8)}), "must be a matrix of torch.int8, got torch.uint8"),
    "a row too few": (lambda t: t.update({HEAD: t[HEAD][:-1].clone(), f"{HEAD}.row_absmax": torch.ones(96)}),
                      "has shape (96, 32), config.json asks for (97, 32)"),
    "NaN scale": (lambda t: t.update({f"{HEAD}.row_absmax": torch.full((97,), torch.nan)}), "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_int8_weight_is_refused_by_name(tmp_path, source, fault):
    """File, tensor and what was found there are named."""
    folder = written(source, tmp_path / "few", embedding="keep", head="int8")
    change, message = BAD[fault]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=rf"model\.safetensors: tensor {re.escape(HEAD)}.*{re.escape(message)}"):
        hf.load_model(folder)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_file_written_wrong_is_found_before_it_gets_its_name(tmp_path, source, monkeypatch, kind):
    """Codes of other tokens are more than rounding; no folder is left."""
    honest = hf.save_quantized

    def broken(place, *arguments, **options):
        honest(place, *arguments, **options)
        tensors = load_file(place / "model.safetensors")
        tensors[EMBEDDING] = tensors[EMBEDDING].roll(16 * 32, 0) if kind == "nf4" else tensors[EMBEDDING].roll(1, 0)
        save_file(tensors, place / "model.safetensors")

    monkeypatch.setattr(convert_module.hf, "save_quantized", broken)
    with pytest.raises(GateFailed, match=rf"^{re.escape(EMBEDDING)} differs by .* more than its rounding"):
        written(source, tmp_path / "few", embedding=kind)
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_embedding_that_is_not_finite_is_named(tmp_path, make_model, kind):
    """In memory too, where no reader has looked at it before."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = torch.nan
    with pytest.raises(DataError, match=rf"^{re.escape(EMBEDDING)}: a weight to quantize must be finite, .* row [23] "):
        convert(Source(model, None, "hf"), Target(tmp_path / "few", "nf4", held=QuantizeConfig(embedding=kind)))
    assert not (tmp_path / "few").exists()


def test_what_is_in_few_bits_is_not_quantized_again(tmp_path, source, capsys):
    """Neither NF4 nor a budget is made of NF4: the way out is named, and nothing is written."""
    folder = written(source, tmp_path / "nf4")
    for options in (["nf4"], ["nf-bits", "--bits", "4"]):
        assert main(["convert", str(folder), str(tmp_path / "again"), "--to", *options]) == 2
        said = capsys.readouterr().err
        assert "the source is quantized already, and quantizing it again would add a second error" in said
        assert "--to hf" in said
    assert not (tmp_path / "again").exists()
    assert main(["convert", str(folder), str(tmp_path / "wide"), "--to", "hf"]) == 0
    assert main(["convert", str(tmp_path / "wide"), str(tmp_path / "again"), "--to", "nf4"]) == 0


def test_the_command_takes_kinds_and_refuses_them_elsewhere(tmp_path, source, capsys):
    """`--embedding` and `--head` belong to nf4 without a budget."""
    words = ["convert", str(source), str(tmp_path / "few"), "--to", "nf4", "--embedding", "int8", "--head", "nf4"]
    assert main(words) == 0
    assert {key: announced(tmp_path / "few")[key] for key in ("embedding", "head")} == {
        "embedding": "int8",
        "head": "nf4",
    }
    assert main(["convert", str(tmp_path / "few"), str(tmp_path / "wide"), "--to", "hf"]) == 0
    assert torch.equal(logits(tmp_path / "wide").argmax(-1), logits(tmp_path / "few").argmax(-1))
    capsys.readouterr()
    for flags in (["--to", "gguf", "--embedding", "int8"], ["--to", "nf-bits", "--bits", "4", "--head", "nf4"]):
        shutil.rmtree(tmp_path / "no", ignore_errors=True)
        assert main(["convert", str(source), str(tmp_path / "no"), *flags]) == 2
        assert f"{flags[-2]} chooses how --to nf4 stores it, got --to {flags[1]}" in capsys.readouterr().err

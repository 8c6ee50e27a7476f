"""Conversions are proved before they get their name: planted defects are found, and a failure leaves nothing."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from entrenar.cli.main import main
from entrenar.data import Tokenizer, train_bpe
from entrenar.errors import ConfigError, DataError, FormatError, GateFailed
from entrenar.files import read_json, write_json
from entrenar.interop import convert as convert_module
from entrenar.interop import gguf, llama2c
from entrenar.interop.convert import Target, Threshold, convert
from entrenar.interop.proof.numpy_llama import logits as numpy_logits
from entrenar.interop.proof.read_hf import read_hf_folder
from entrenar.interop.rotary_rows import half_split, interleaved
from entrenar.interop.source import Source, detect, open_source
from entrenar.model import RopeScaling

pytest.importorskip("gguf")
WAYS = [("hf", "f32"), ("hf", "bf16"), ("hf", "f16"), ("llama2c", "f32"), ("llama2c", "q8_0"), ("gguf", "f32"),
        ("gguf", "f16"), ("gguf", "bf16"), ("gguf", "q8_0"), ("gguf", "q4_0")]  # fmt: skip


def target(folder, kind, dtype=None, **options):
    return Target(folder / ("m.gguf" if kind == "gguf" else kind), kind, dtype, **options)


@pytest.fixture
def stories(shared_data):
    """The trained model with llama2.c's own tokenizer."""
    return open_source(shared_data / "models/stories260K/stories260K.bin", shared_data / "tokenizers/tok512/tok512.bin")


@pytest.mark.parametrize(("kind", "dtype"), WAYS)
def test_every_format_and_dtype_of_the_trained_model_is_proved(tmp_path, stories, kind, dtype):
    """47 tensors and 220 strings; where nothing is rounded the logits agree to float32's rounding."""
    place = target(tmp_path, kind, dtype)
    report = convert(stories, place)
    assert len(report.tensor_errors) == 47
    assert report.num_strings > 200
    assert report.differing_strings == []
    if dtype == "f32":
        assert report.metrics["tensor_error"] == 0
        assert report.max_logit_difference < 1e-4
    largest_kl = {"f32": 1e-9, "f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-2, "q4_0": 0.3}[dtype]
    assert 0 <= report.kl < largest_kl
    assert report.top1 > (0.6 if dtype == "q4_0" else 0.97)
    back = open_source(place.path)
    assert detect(place.path) == kind
    assert back.tokenizer.encode("Once upon a time") == stories.tokenizer.encode("Once upon a time")
    assert [path.name for path in tmp_path.iterdir()] == [place.path.name]
    assert re.search(
        r"tensors +47 read back.*\nlogits .*\nKL .*\ntokenizer +(\d+) of \1 strings", "\n".join(report.lines())
    )


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_both_layouts_of_llama2c_are_proved(tmp_path, make_model, version, is_tied):
    """The version that was asked for is written, with the head or without, and no weight changes."""
    model = make_model(tie_word_embeddings=is_tied)
    place = target(tmp_path, "llama2c", llama2c_version=version)
    report = convert(Source(model, None, "hf"), place)
    assert report.metrics["tensor_error"] == 0
    assert llama2c.read_header(place.path / "model.bin").version == version
    back = open_source(place.path).model.state_dict()
    assert all(torch.equal(weight, back[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="linear", factor=2),
        RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=16),
        RopeScaling(
            rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
        ),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_scaled_and_byte_level_models_are_proved(tmp_path, make_model, scaling, kind):
    """Scaling and a tokenizer of the other family pass through both formats."""
    tokenizer = train_bpe(["def f(x):\n    return x + 12345\n", "naïve café don't 漢字 🙂"] * 20, 400)
    model = make_model(vocab_size=416, rope_scaling=scaling, max_seq_len=65536, rope_theta=500000.0)
    report = convert(Source(model, tokenizer, "hf"), target(tmp_path, kind, "f32"))
    assert report.max_logit_difference < 1e-4
    assert report.differing_strings == []


def test_a_bfloat16_source_is_compared_in_float32(tmp_path, make_model):
    """Its logits are computed in float32 from its weights, and it stays bfloat16."""
    model = make_model().bfloat16()
    report = convert(Source(model, None, "hf"), target(tmp_path, "hf"))
    assert report.max_logit_difference < 1e-5
    assert report.num_strings == 0
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert open_source(tmp_path / "hf").model.lm_head.weight.dtype == torch.bfloat16


DEFECTS = {
    "rows are not interleaved": ("interleaved", lambda weight, _: weight, r"_proj\.weight differs by "),
    "rows are interleaved the wrong way": ("interleaved", half_split, r"_proj\.weight differs by "),
    "with the other number of heads": (
        "interleaved", lambda weight, heads: interleaved(weight, heads * 2), r"_proj\.weight differs by "
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", [gguf, llama2c])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_in_the_order_of_rows_is_found(tmp_path, stories, monkeypatch, module, defect):
    """The classic of broken exports; nothing is left behind."""
    name, wrong, message = DEFECTS[defect]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(GateFailed, match=message):
        convert(stories, target(tmp_path, module.__name__.rpartition(".")[2], "f32"))
    assert not list(tmp_path.iterdir())


def test_swapped_gate_and_up_are_found(tmp_path, stories, monkeypatch):
    """Same shapes, wrong places."""
    honest = gguf.gguf_name

    def swapped(name: str) -> str:
        return honest(name).translate({}).replace("ffn_gate", "x").replace("ffn_up", "ffn_gate").replace("x", "ffn_up")

    monkeypatch.setattr(gguf, "gguf_name", swapped)
    with pytest.raises(GateFailed, match=r"mlp\.(gate|up)_proj\.weight differs by "):
        convert(stories, target(tmp_path, "gguf", "f32"))


@pytest.mark.parametrize(
    ("key", "value"), [("llama.rope.freq_base", 5e5), ("llama.attention.layer_norm_rms_epsilon", 0.5)]
)
def test_a_wrong_word_about_the_architecture_is_found(tmp_path, stories, monkeypatch, key, value):
    """All weights are right, the logits are not."""
    honest = gguf.architecture_metadata
    monkeypatch.setattr(gguf, "architecture_metadata", lambda config: {**honest(config), key: value})
    with pytest.raises(GateFailed, match=r"every weight of the file is right, yet its logits differ by .*architecture"):
        convert(stories, target(tmp_path, "gguf", "f32"))
    assert not list(tmp_path.iterdir())


def test_wrong_scores_are_found(tmp_path, stories, monkeypatch):
    """The tokens are right, but merge in another order."""
    honest = gguf.vocabulary_metadata

    def reversed_scores(*arguments):
        keys = honest(*arguments)
        return keys | {"tokenizer.ggml.scores": [-score for score in keys["tokenizer.ggml.scores"]]}

    monkeypatch.setattr(gguf, "vocabulary_metadata", reversed_scores)
    with pytest.raises(GateFailed, match=r"the file's tokenizer gives \d+ of \d+ strings other ids"):
        convert(stories, target(tmp_path, "gguf", "f32"))


@pytest.mark.parametrize(("kind", "message"), [("gguf", "bos is 2 in the file, 1"), ("hf", "eos is 1 in the file, 2")])
def test_a_wrong_token_at_the_end_of_a_text_is_found(tmp_path, stories, monkeypatch, kind, message):
    """Every text has its ids, but the model would begin it with another token, or never stop."""
    honest, save = gguf.vocabulary_metadata, Tokenizer.save

    def other_name(self, folder):
        save(self, folder)
        write_json(folder / "tokenizer_config.json", self.config | {"bos_token": "<s>", "eos_token": "<s>"})

    monkeypatch.setattr(gguf, "vocabulary_metadata", lambda *a: honest(*a) | {"tokenizer.ggml.bos_token_id": 2})
    monkeypatch.setattr(Tokenizer, "save", other_name)
    with pytest.raises(GateFailed, match=f"the token {message} in the tokenizer; nothing was written"):
        convert(stories, target(tmp_path, kind, "f32"))
    assert not list(tmp_path.iterdir())


def test_moved_control_tokens_are_found(tmp_path, stories, monkeypatch):
    """No text becomes one, so no text shows it."""
    save = Tokenizer.save

    def moved(self, folder):
        save(self, folder)
        content = read_json(folder / "tokenizer.json")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]
        del content["model"]["vocab"]["</s>"]
        write_json(folder / "tokenizer.json", content)

    monkeypatch.setattr(Tokenizer, "save", moved)
    with pytest.raises(GateFailed, match="the token '</s>' is None in the file, 2 in the tokenizer"):
        convert(stories, target(tmp_path, "hf", "f32"))


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_weights_out_of_the_bounds_of_rounding_are_found(tmp_path, stories, monkeypatch, dtype):
    """A weight that is a little too large is more than rounding."""
    honest = gguf._rows
    monkeypatch.setattr(gguf, "_rows", lambda *a: honest(*a) * np.float32(1.3))
    with pytest.raises(GateFailed, match=r"differs by .* in the file, more than its rounding; nothing was written$"):
        convert(stories, target(tmp_path, "gguf", dtype))


def test_missing_and_misshapen_tensors_are_found(tmp_path, stories, monkeypatch):
    """By name."""
    honest = read_hf_folder

    def without(place):
        found = honest(place)
        return dataclasses.replace(found, names=found.names - {"model.norm.weight"})

    monkeypatch.setattr(convert_module, "READERS", {"hf": without})
    with pytest.raises(GateFailed, match=r"^the file has other tensors than the model, model\.norm\.weight first"):
        convert(stories, target(tmp_path, "hf"))

    def transposed(place):
        found = honest(place)
        return dataclasses.replace(found, weight=lambda name: found.weight(name)[:].T)

    monkeypatch.setattr(convert_module, "READERS", {"hf": transposed})
    with pytest.raises(
        GateFailed, match=r"^model\.embed_tokens\.weight is \(64, 512\) in the file, \(512, 64\) in the"
    ):
        convert(stories, target(tmp_path, "hf"))


def test_a_file_whose_logits_are_not_finite_is_refused(tmp_path, stories, monkeypatch):
    """Whatever made them so."""
    monkeypatch.setattr("entrenar.interop.proof.verify.logits", lambda *_: np.full((4, 64, 512), np.nan))
    with pytest.raises(GateFailed, match=r"^the file's logits are not finite; nothing was written$"):
        convert(stories, target(tmp_path, "hf"))


def test_a_tokenizer_that_the_format_cannot_hold_is_refused_unless_accepted(tmp_path, shared_data):
    """tok512.model collapses spaces, llama2.c's program does not."""
    source = open_source(
        shared_data / "models/stories260K/stories260K.bin", shared_data / "tokenizers/tok512/tok512.model"
    )
    with pytest.raises(
        GateFailed, match=r"^the file's tokenizer gives \d+ of 220 strings other ids, ' ' first; .*--accept"
    ):
        convert(source, target(tmp_path, "llama2c"))
    assert not list(tmp_path.iterdir())
    report = convert(source, target(tmp_path, "llama2c", accepts_tokenizer_differences=True))
    assert "  two  spaces  " in report.differing_strings
    assert any("differs: ' '" in line for line in report.lines())


def test_thresholds(tmp_path, stories):
    """Both directions; a breach names both numbers and leaves nothing."""
    refused = [Threshold.parse("kl > 1e-3")]
    with pytest.raises(GateFailed, match=r"^kl is 0\.\d+, refused if > 0\.001; nothing was written$"):
        convert(stories, target(tmp_path, "gguf", "q4_0"), refused)
    with pytest.raises(GateFailed, match=r"^top1 is 0\.\d+, refused if < 0\.99; nothing was written$"):
        convert(stories, target(tmp_path, "gguf", "q4_0"), [Threshold.parse("top1<0.99")])
    assert not list(tmp_path.iterdir())
    convert(stories, target(tmp_path, "gguf", "q8_0"), [Threshold.parse("kl>1"), Threshold.parse("top1<0.5")])


@pytest.mark.parametrize("text", ["kl", "kl>", "loss>1", "kl>x", "kl>=1", "kl>1e", ""])
def test_a_malformed_threshold_is_refused(text):
    """With the form it must have."""
    with pytest.raises(ConfigError, match=r"^--refuse-if must be one of kl, max_kl, dlogit, top1, tensor_error, then"):
        Threshold.parse(text)


def test_what_is_there_is_not_replaced_unless_asked(tmp_path, stories):
    """Neither a file nor a folder with something in it; and never one by the other."""
    place = target(tmp_path, "gguf")
    place.path.write_text("precious")
    with pytest.raises(ConfigError, match=r"m\.gguf exists; name another place or give --overwrite$"):
        convert(stories, place)
    assert place.path.read_text() == "precious"
    convert(stories, dataclasses.replace(place, can_overwrite=True))
    with pytest.raises(ConfigError, match=r"m\.gguf is a file, hf is not; name another place$"):
        convert(stories, Target(place.path, "hf", can_overwrite=True))
    with pytest.raises(ConfigError, match=r"is a folder, gguf is not; name another place$"):
        convert(stories, Target(tmp_path, "gguf", can_overwrite=True))
    with pytest.raises(FormatError, match=r"is not a model folder: it has neither config\.json nor model\.bin$"):
        convert(stories, Target(tmp_path, "hf", can_overwrite=True))
    assert place.path.is_file()


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path, stories):
    """With those it has."""
    with pytest.raises(ConfigError, match=r"^--dtype for llama2c must be one of f32, q8_0, got 'q4_0'$"):
        convert(stories, target(tmp_path, "llama2c", "q4_0"))


def test_formats_are_told_by_content(tmp_path, shared_data):
    """Never by the name; a pickle is refused with the way out."""
    assert detect(shared_data / "models/gguf/llama-2-tiny-random.gguf") == "gguf"
    assert detect(shared_data / "models/stories260K/stories260K.bin") == "llama2c"
    assert detect(shared_data / "models/stories260K_hf") == "hf"
    with pytest.raises(DataError, match=r"^no model at .*nothing: give a Hugging Face folder, a \.gguf or a llama2\.c"):
        detect(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"is not a model folder: it has neither config\.json nor model\.bin$"):
        detect(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is a pickle, which can run code .*save_pretrained$"):
        detect(tmp_path / "pytorch_model.bin")
    part = shared_data / "models/stories260K_hf/model.safetensors"
    with pytest.raises(FormatError, match=r"is a part of a Hugging Face folder; give the folder, .*stories260K_hf$"):
        detect(part)


def test_the_tokenizer_beside_a_model_is_found(tmp_path, shared_data):
    """tok105.model lies beside model.bin."""
    source = open_source(shared_data / "models/tok105_5000/model.bin")
    assert source.tokenizer.vocab_size == 105
    assert open_source(shared_data / "models/stories260K_hf").tokenizer is None


def test_the_numpy_forward_reproduces_the_reference(tmp_path, shared_data):
    """The judge itself is judged: trained weights, logits made by two other implementations."""
    reference = np.load(shared_data / "models/stories260K_hf/reference_logits.npz")
    source = open_source(shared_data / "models/stories260K_hf")
    convert(source, target(tmp_path, "hf"))
    read = read_hf_folder(tmp_path / "hf")
    found = numpy_logits(read.weight, read.shape, reference["prompt_ids"].reshape(1, -1))
    assert np.abs(found - reference["logits_numpy_fp64"].reshape(found.shape)).max() < 1e-6


def test_the_command_prints_the_report_and_ends_with_its_code(tmp_path, shared_data, capsys):
    """0 with the report; 1 without a file; 2 for a wrong word."""
    words = [
        "convert",
        str(shared_data / "models/stories260K/stories260K.bin"),
        str(tmp_path / "m.gguf"),
        "--to",
        "gguf",
    ]
    words += ["--tokenizer", str(shared_data / "tokenizers/tok512/tok512.bin"), "--dtype", "q4_0"]
    assert main([*words, "--refuse-if", "kl>0.001", "top1<0.1"]) == 1
    assert "kl is 0." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "(llama2c) -> " in out
    assert "220 of 220 strings have the same ids" in out
    assert main([*words, "--refuse-if", "nonsense"]) == 2
    loaded = open_source(tmp_path / "m.gguf")
    assert isinstance(loaded.tokenizer, Tokenizer)

"""NF4 folders are bitsandbytes': theirs open here, ours there, and what means other numbers is refused."""

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
from entrenar.interop import hf, hf_files
from entrenar.interop.convert import Target, convert
from entrenar.interop.proof.read_hf import read_hf_folder
from entrenar.interop.source import Source, open_source
from entrenar.ops import dequantize_nf4
from entrenar.peft import quantized_projections, widen

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

IDS = torch.arange(20)[None] % 61
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def tiny(make_model, **changes):
    """Widths that a block of 64 divides, as bitsandbytes' own products ask for."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
    return make_model(**(sizes | changes))


def saved(folder: Path, model) -> Path:
    folder.mkdir()
    hf.save_model(folder, model.config, dict(model.named_parameters()))
    return folder


def theirs(source: Path, folder: Path, dtype: torch.dtype, *, double: bool) -> Path:
    """The folder that transformers and bitsandbytes write."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def their_logits(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # in training mode, since for inference bitsandbytes multiplies in bfloat16 on some processors
        return transformers.AutoModelForCausalLM.from_pretrained(folder).train()(IDS).logits


@torch.no_grad()
def our_logits(folder: Path) -> torch.Tensor:
    return hf.load_model(folder)(IDS)


@pytest.fixture
def folder(tmp_path, make_model) -> Path:
    """An NF4 folder of ours."""
    model = tiny(make_model)
    place = tmp_path / "nf4"
    place.mkdir()
    hf.save_quantized(place, model.config, model.named_parameters(), torch.float32)
    return place


@pytest.mark.parametrize("double", [True, False])
def test_a_folder_of_bitsandbytes_opens_here_with_equal_logits(tmp_path, make_model, double):
    """Scales quantized twice and once are read; logits in float32 are the same."""
    source = saved(tmp_path / "plain", tiny(make_model))
    folder = theirs(source, tmp_path / "theirs", torch.float32, double=double)
    assert len(list(quantized_projections(hf.load_model(folder)))) == 7 * hf.read_config(folder).num_layers
    torch.testing.assert_close(our_logits(folder), their_logits(folder), rtol=1e-5, atol=1e-6)


def test_a_folder_of_ours_opens_there_with_equal_logits(folder):
    """They load it as they load their own."""
    torch.testing.assert_close(their_logits(folder), our_logits(folder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_one_that_bitsandbytes_writes(tmp_path, make_model, dtype):
    """Same names, dtypes, shapes and bytes; the state says the same."""
    source = saved(tmp_path / "plain", tiny(make_model).to(dtype))
    convert(open_source(source, is_streamed=True), Target(tmp_path / "ours", "nf4"))
    wanted = load_file(theirs(source, tmp_path / "theirs", dtype, double=True) / "model.safetensors")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if "quant_state" in name:
            assert json.loads(bytes(found[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("width", [64, 24])
def test_quantizing_while_loading_is_what_the_folder_holds(tmp_path, make_model, width):
    """A plain folder quantized into memory gives the logits of the quantized folder, bit for bit."""
    source = saved(tmp_path / "plain", tiny(make_model, hidden_size=width).bfloat16())
    convert(open_source(source, is_streamed=True), Target(tmp_path / "nf4", "nf4"))
    with torch.no_grad():
        straight = hf.load_model(source, quantize=True)(IDS)
    assert torch.equal(straight, our_logits(tmp_path / "nf4"))


def test_weights_are_quantized_as_the_file_has_them(tmp_path, make_model):
    """Loading the rest in bfloat16 does not round a float32 weight before it is quantized."""
    source = saved(tmp_path / "plain", tiny(make_model))
    wide, narrow = (hf.load_model(source, dtype=dtype, quantize=True) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.model.embed_tokens.weight.dtype == torch.bfloat16
    for (_, one), (_, other) in zip(quantized_projections(wide), quantized_projections(narrow), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.absmax, other.absmax)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"hidden_size": 24, "intermediate_size": 40}])
def test_a_conversion_is_proved_from_folder_and_from_memory(tmp_path, make_model, change):
    """Every weight within its level's gap, streamed or not, tied or not, also where no block divides a width."""
    model = tiny(make_model, **change)
    source = saved(tmp_path / "plain", model)
    streamed = convert(open_source(source, is_streamed=True), Target(tmp_path / "a", "nf4", "bf16"))
    at_once = convert(Source(model, None, "hf"), Target(tmp_path / "b", "nf4", "bf16"))
    assert streamed.tensor_errors == at_once.tensor_errors
    assert streamed.kl == pytest.approx(at_once.kl, rel=1e-3)
    assert 0 < streamed.kl < 0.1
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()
    assert our_logits(tmp_path / "a").equal(our_logits(tmp_path / "b"))


def test_a_folder_in_shards_opens(tmp_path, make_model):
    """Parts of one weight may lie in different files."""
    model = tiny(make_model)
    place = tmp_path / "nf4"
    place.mkdir()
    hf.save_quantized(place, model.config, model.named_parameters(), torch.float32, max_shard_bytes=3000)
    assert len(list(place.glob("*.safetensors"))) > 5
    torch.testing.assert_close(our_logits(place), their_logits(place), rtol=1e-5, atol=1e-6)


def test_the_independent_reader_finds_the_same_numbers(folder):
    """A reading in numpy of codes and scales equals the one that the model computes with."""
    model = hf.load_model(folder)
    read = read_hf_folder(folder)
    for name, module in quantized_projections(model):
        rows = read.weight(f"{name}.weight")
        assert rows.shape == module.shape
        assert torch.equal(torch.from_numpy(rows[3:9]), dequantize_nf4(module.quantized)[3:9])


def test_nf4_converts_back_to_plain_weights(tmp_path, folder):
    """`--to hf` of a quantized folder writes what the codes stand for."""
    assert main(["convert", str(folder), str(tmp_path / "wide"), "--to", "hf"]) == 0
    model = hf.load_model(folder)
    widen(model)
    plain = hf.load_model(tmp_path / "wide")
    assert all(torch.equal(found, model.get_parameter(name)) for name, found in plain.named_parameters())
    assert not hf.is_quantized(tmp_path / "wide")


def test_the_command_prints_what_quantizing_cost(tmp_path, make_model, capsys):
    """The report has the logits and KL against the source; a threshold gives 1 and leaves no folder."""
    source = saved(tmp_path / "plain", tiny(make_model))
    assert main(["convert", str(source), str(tmp_path / "nf4"), "--to", "nf4"]) == 0
    said = capsys.readouterr().out
    assert "(hf) -> " in said
    assert "(nf4 f32)" in said
    assert re.search(r"KL +mean [0-9.e-]+, max [0-9.e-]+ nats a token", said)
    assert main(["convert", str(source), str(tmp_path / "no"), "--to", "nf4", "--refuse-if", "kl>1e-9"]) == 1
    assert re.search(r"kl is .*, refused if > 1e-09; nothing was written", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4", "plain"]


def swap_halves(tensors):
    tensors[Q] = tensors[Q] << 4 | tensors[Q] >> 4


def shift_scales(tensors):
    tensors[f"{Q}.absmax"] = tensors[f"{Q}.absmax"].roll(1)


def transposed_codes(tensors):
    codes = torch.stack((tensors[Q][:, 0] >> 4, tensors[Q][:, 0] & 15), 1).view(64, 64).T.reshape(-1)
    tensors[Q] = (codes[::2] << 4 | codes[1::2])[:, None].contiguous()


@pytest.mark.parametrize("defect", [swap_halves, shift_scales, transposed_codes])
def test_a_file_written_wrong_is_found_before_it_gets_its_name(tmp_path, make_model, monkeypatch, defect):
    """Swapped nibbles, scales of the wrong block, a transposed weight: each is more than rounding."""
    honest = hf.save_quantized

    def broken(place, *arguments, **options):
        honest(place, *arguments, **options)
        tensors = load_file(place / "model.safetensors")
        defect(tensors)
        save_file(tensors, place / "model.safetensors")

    monkeypatch.setattr(convert_module.hf, "save_quantized", broken)
    source = open_source(saved(tmp_path / "plain", tiny(make_model)), is_streamed=True)
    with pytest.raises(GateFailed, match=rf"^{re.escape(Q)} differs by .* in the file, more than its rounding"):
        convert(source, Target(tmp_path / "nf4", "nf4"))
    assert not (tmp_path / "nf4").exists()


@pytest.mark.parametrize("has_parameters", [True, False])
def test_a_folder_of_another_writer_is_quantized(tmp_path, make_model, has_parameters):
    """Transformers 5 writes rope_parameters alone; the first LLaMA folders leave out what follows from the rest."""
    source = saved(tmp_path / "plain", tiny(make_model))
    values = json.loads((source / "config.json").read_text())
    for key in ["rope_theta", *([] if has_parameters else ["rope_parameters", "head_dim", "tie_word_embeddings"])]:
        del values[key]
    (source / "config.json").write_text(json.dumps(values))
    convert(open_source(source, is_streamed=True), Target(tmp_path / "nf4", "nf4"))
    assert hf.is_quantized(tmp_path / "nf4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_no_folder(tmp_path, make_model, bad):
    """The tensor is named, and nothing stays."""
    model = tiny(make_model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 5] = bad
    source = saved(tmp_path / "plain", model)
    with pytest.raises(FormatError, match=rf"tensor {re.escape(Q)} holds NaN or infinite weights"):
        convert(open_source(source, is_streamed=True), Target(tmp_path / "nf4", "nf4"))
    with pytest.raises(DataError, match=rf"^{re.escape(Q)}: a weight to quantize must be finite"):
        convert(Source(model, None, "hf"), Target(tmp_path / "nf4", "nf4"))
    with pytest.raises(FormatError, match=rf"tensor {re.escape(Q)} holds NaN or infinite weights"):
        hf.load_model(source, quantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def with_state(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def without_offset(tensors):
    state = json.loads(bytes(tensors[STATE].tolist()))
    del state["nested_offset"]
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def replaced(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


def dropped(name):
    return lambda tensors: tensors.__delitem__(name)


AGAIN = "; quantize the original weights again with `entrenar convert --to nf4`"
BAD = {
    "another block": (with_state(blocksize=128), "blocksize must be 64, got 128" + AGAIN),
    "another type": (with_state(quant_type="fp4"), "quant_type must be 'nf4', got 'fp4'" + AGAIN),
    "another nested block": (with_state(nested_blocksize=64), "nested_blocksize must be 256, got 64" + AGAIN),
    "another nested dtype": (with_state(nested_dtype="float16"), "nested_dtype must be 'float32', got 'float16'"),
    "no shape": (with_state(shape=[64]), "shape must be two positive numbers, got [64]"),
    "a huge shape": (with_state(shape=[2**40, 64]), f"must hold {2**45} of torch.uint8, got 2048 of torch.uint8"),
    "another shape": (with_state(shape=[32, 128]), "has shape (32, 128), config.json asks for (64, 64)"),
    "no offset at all": (without_offset, "nested_offset must be a finite number of float32, got None"),
    "no offset": (with_state(nested_offset=None), "nested_offset must be a finite number of float32, got None"),
    "NaN offset": (with_state(nested_offset=float("nan")), "nested_offset must be a finite number of float32, got nan"),
    "an offset beyond float32": (with_state(nested_offset=1e39), "nested_offset must be a finite number of float32, "),
    "an offset beyond float64": (with_state(nested_offset=10**400), "nested_offset must be a finite number of float32"),
    "state of no JSON": (replaced(STATE, lambda raw: raw[:-1]), "quant_state.bitsandbytes__nf4 is no JSON: "),
    "state of no object": (
        replaced(STATE, lambda _: torch.tensor(list(b"[1]"), dtype=torch.uint8)), "must be a JSON object, got [1]"
    ),
    "wrong code book": (
        replaced(f"{Q}.quant_map", lambda levels: levels.flip(0)),
        "quant_map must be the 16 levels of NF4, got another table: these codes mean other numbers than are read here",
    ),
    "wrong map": (replaced(f"{Q}.nested_quant_map", lambda t: t * 2), "nested_quant_map must be the 8-bit dynamic map"),
    "truncated absmax": (
        replaced(f"{Q}.absmax", lambda scales: scales[:-1]),
        "absmax must hold 64 of torch.uint8, got 63 of torch.uint8",
    ),
    "absmax as numbers": (
        replaced(f"{Q}.absmax", torch.Tensor.float), "absmax must hold 64 of torch.uint8, got 64 of torch.float32"
    ),
    "truncated nested absmax": (
        replaced(f"{Q}.nested_absmax", lambda scales: scales[:0]), "nested_absmax must hold 1 of torch.float32, got 0"
    ),
    "NaN scale": (
        replaced(f"{Q}.nested_absmax", lambda scales: scales * torch.nan), "holds NaN or infinite weights"
    ),
    "truncated codes": (replaced(Q, lambda codes: codes[:-1]), "must hold 2048 of torch.uint8, got 2047 of torch"),
    "missing codes": (dropped(Q), "is missing, of it there is only absmax, nested_absmax, nested_quant_map, quant_map"),
    "state of numbers": (
        replaced(STATE, torch.Tensor.float), "nf4 must be bytes in a row, got torch.float32 of shape ("
    ),
    "state of rows": (replaced(STATE, lambda raw: raw[None]), "must be bytes in a row, got torch.uint8 of shape (1, "),
    "a deep state": (
        replaced(STATE, lambda _: torch.full((100_000,), ord("["), dtype=torch.uint8)), "nf4 is no JSON: maximum recurs"
    ),
    "codes without scales": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{Q}.")],
        "holds codes (torch.uint8), but lacks its scales",
    ),
    "missing state": (dropped(STATE), "lacks its quant_state.bitsandbytes__nf4; a weight in NF4 has "),
    "missing scales": (dropped(f"{Q}.absmax"), "lacks its absmax; a weight in NF4 has codes and absmax, "),
    "missing nested scales": (dropped(f"{Q}.nested_absmax"), "lacks its nested_absmax; a weight in NF4 has codes and"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_or_foreign_weight_is_refused_by_name(folder, fault):
    """File, tensor, field and what was found there are named; nothing is guessed and nothing large allocated."""
    change, message = BAD[fault]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=rf"model\.safetensors: tensor {re.escape(Q)}.*{re.escape(message)}"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("added", "dropped", "message"),
    [
        ("model.norm.weight.absmax", (), "model.norm.weight cannot be quantized, but the folder also holds its absmax"),
        ("model.norm.weight.absmax", ("model.norm.weight",), "model.norm.weight is missing, of it there is only abs"),
        ("model.nowhere.weight", (), "model.nowhere.weight, which the architecture in config.json does not have"),
    ],
)  # fmt: skip
def test_what_is_no_matrix_has_no_parts(folder, added, dropped, message):
    """Scales beside a norm, or in its place, are no weight of the architecture."""
    tensors = load_file(folder / "model.safetensors") | {added: torch.ones(64)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(FormatError, match=rf"model\.safetensors.*tensor {re.escape(message)}"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method must be 'bitsandbytes', got 'gptq'; read are"),
        ({"load_in_4bit": False}, "quantization_config.load_in_4bit must be True, got False"),
        ({"bnb_4bit_quant_type": "fp4"}, "quantization_config.bnb_4bit_quant_type must be 'nf4', got 'fp4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage must be 'uint8', got 'bfloat16'"),
    ],
)  # fmt: skip
def test_another_quantization_is_refused_with_the_way_out(folder, change, message):
    """Only this layout is read, and config.json says which it is."""
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=re.escape(message)):
        hf.load_model(folder)


def test_codes_without_an_announcement_are_no_weights(folder):
    """A config.json without quantization_config beside quantized weights is refused."""
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=r"has dtype U8; weights are one of F64, F32, F16, BF16"):
        hf.load_model(folder)


def test_a_dtype_that_nf4_does_not_keep_is_refused(tmp_path, make_model):
    """--dtype names what is not quantized."""
    with pytest.raises(ConfigError, match="--dtype for nf4 must be one of f32, f16, bf16, got 'q8_0'"):
        convert(Source(tiny(make_model), None, "hf"), Target(tmp_path / "nf4", "nf4", "q8_0"))


def test_a_quantized_folder_is_mapped_and_not_copied(folder):
    """Codes lie in the file's own pages: what is written to the file meanwhile is seen."""
    copy = shutil.copytree(folder, folder.parent / "copy")
    model = hf.load_model(copy)
    _, module = next(quantized_projections(model))
    before = module.codes.clone()
    header = hf_files.read_entries(copy, has_codes=True)[Q][1]
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(header.offset)
        stream.write(bytes([int(before[0]) ^ 0xFF]))
    assert int(module.codes[0]) == int(before[0]) ^ 0xFF

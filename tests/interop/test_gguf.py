"""GGUF: published files load, ours are read by the gguf package and by transformers, damage is named."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer, train_bpe
from entrenar.errors import ConfigError, EntrenarError, FormatError
from entrenar.interop import gguf as ours
from entrenar.interop.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from entrenar.interop.gguf_file import dequantize_q4_0, dequantize_q8_0, read_gguf
from entrenar.interop.llama2c import load_llama2c
from entrenar.interop.proof.verify import HARD_STRINGS
from entrenar.model import RopeScaling

package = pytest.importorskip("gguf")
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
)
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]


def logits_of(model, input_ids):
    with torch.no_grad():
        out = model(input_ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_the_published_model_loads(shared_data):
    """All 12 tensors and the vocabulary, whose ids are those of the sentencepiece model."""
    path = shared_data / "models/gguf/llama-2-tiny-random.gguf"
    model, tokenizer = load_gguf(path)
    weights = model.state_dict()
    reader = package.GGUFReader(path)
    assert len(weights) == len(reader.tensors) == 12
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(tensor.data)).float()
        name = ours.our_name(tensor.name)
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            # 2 heads of 4: interleaved rows 0 1 2 3 are half-split rows 0 2 1 3
            values = values[[0, 2, 1, 3, 4, 6, 5, 7]]
        assert torch.equal(weights[name].float(), values), name
    assert model.config.num_heads == 2
    assert weights["model.embed_tokens.weight"].dtype == torch.float16
    expected = Tokenizer.load(shared_data / "tokenizers/llama2/tokenizer.model")
    texts = ["Hello world", "  spaces\n漢字 🙂", "▁x", "        indent"]
    assert [tokenizer.encode(text) for text in texts] == [expected.encode(text) for text in texts]


def test_the_published_vocabulary_gives_the_published_ids(shared_data):
    """A GGUF without tensors is a tokenizer; llama.cpp's 47 vectors hold for it."""
    folder = shared_data / "tokenizers/vectors"
    tokenizer = load_gguf_tokenizer(read_gguf(folder / "ggml-vocab-llama-spm.gguf"))
    texts = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-llama-spm.gguf.out").read_text("utf-8").split("\n")
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text) == [int(number) for number in line.split()], text
    with pytest.raises(FormatError, match=r"lacks tensor token_embd\.weight, so its 0 tensors are not a model$"):
        load_gguf(folder / "ggml-vocab-llama-spm.gguf")


@pytest.mark.parametrize("type_name", TYPES)
def test_the_gguf_package_reads_what_is_written(tmp_path, make_model, type_name):
    """Types, shapes and numbers: its dequantization of our file is ours."""
    model = make_model()
    path = tmp_path / "model.gguf"
    save_gguf(path, model.config, model.state_dict(), None, type_name=type_name)
    reader = package.GGUFReader(path)
    back, tokenizer = load_gguf(path, dtype=torch.float32)
    assert tokenizer is None
    assert back.config == model.config
    assert len(reader.tensors) == len(model.state_dict())
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else type_name.upper())
        values = torch.from_numpy(np.array(package.quants.dequantize(tensor.data, tensor.tensor_type)))
        assert np.isclose(values.double().sum(), back.state_dict()[ours.our_name(tensor.name)].double().sum())
    if type_name == "f32":
        assert all(torch.equal(back.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("general.quantization_version").contents() == 2


@pytest.mark.parametrize("dequantize", [("Q8_0", dequantize_q8_0, 34), ("Q4_0", dequantize_q4_0, 18)])
def test_dequantization_equals_the_packages(dequantize):
    """On random bytes as blocks."""
    name, function, size = dequantize
    data = np.random.default_rng(0).integers(0, 256, (50, size), dtype=np.uint8)
    data[:, 1] = 0x2C  # a scale that is a normal float16
    theirs = package.quants.dequantize(data, package.GGMLQuantizationType[name])
    assert np.array_equal(function(data.reshape(-1)), theirs)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("scaling", [None, LLAMA3, RopeScaling(rope_type="linear", factor=4)])
def test_config_and_weights_survive(tmp_path, make_model, input_ids, is_tied, scaling):
    """Tied or not, stretched or not: same config, same logits."""
    model = make_model(
        tie_word_embeddings=is_tied, rope_scaling=scaling, max_seq_len=65536, rope_theta=500000.0, eos_token_id=2
    )
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None, type_name="f32")
    back, _ = load_gguf(tmp_path / "m.gguf")
    assert back.config.rope_scaling == scaling
    assert torch.equal(logits_of(back, input_ids), logits_of(model, input_ids))


def test_rows_that_fit_no_block_stay_f16(tmp_path, make_model):
    """44 is no multiple of 32; the other matrices are quantized."""
    model = make_model(intermediate_size=44)
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None, type_name="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_transformers_reads_model_and_tokenizer(shared_data, tmp_path):
    """Its GGUF loader gives the logits of the trained model, and the ids of texts without a space at the front.

    (With one it drops a space that sentencepiece, llama.cpp and we keep.)
    """
    transformers = pytest.importorskip("transformers")
    model = load_llama2c(shared_data / "models/stories260K/stories260K.bin")
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, type_name="f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily.", bos=True)])
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = [text for text in HARD_STRINGS if not text.startswith((" ", "▁", "<s>"))]
    assert len(texts) > 20
    for text in texts:
        assert their_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


def test_transformers_reads_a_byte_level_tokenizer(tmp_path, make_model):
    """All hard strings have our ids there."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(["def f(x):\n    return x + 12345\n", "naïve café don't 漢字 🙂"] * 20, 400)
    model = make_model(vocab_size=400)
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, type_name="f32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in HARD_STRINGS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


def test_a_byte_level_vocabulary_survives(tmp_path, make_model):
    """Tokens, merges, pattern, roles and chat template; rows without a token are filled up."""
    trained = train_bpe(["def f(x):\n    return x + 12345\n", "naïve café don't 漢字 🙂"] * 20, 400)
    tokenizer = Tokenizer(dict(trained.content), {**trained.config, "chat_template": "{{ messages }}"})
    model = make_model(vocab_size=416)
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), tokenizer, type_name="f32")
    _, back = load_gguf(tmp_path / "m.gguf")
    texts = ["def f(x):", "  naïve\n\n", "12345678", "<|eos|>", "漢字🙂"]
    assert [back.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert (back.bos_id, back.eos_id, back.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert back.chat_template == "{{ messages }}"
    assert back.vocab_size == tokenizer.vocab_size


def test_what_llama_cpp_cannot_say_is_refused(tmp_path, make_model):
    """A scaling it does not have; more tokens than rows; a word pattern without a name."""
    model = make_model(rope_scaling=RopeScaling(rope_type="dynamic", factor=2))
    with pytest.raises(FormatError, match=r"^llama\.cpp has no rotary scaling like RopeScaling\(rope_type='dynamic'"):
        save_gguf(tmp_path / "m.gguf", model.config, {}, None)
    tokenizer = train_bpe(["some text"] * 5, 260)
    with pytest.raises(FormatError, match=r"^the tokenizer has 26\d tokens, the model 97 rows for them$"):
        save_gguf(tmp_path / "m.gguf", make_model().config, {}, tokenizer)
    content = {**tokenizer.content, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True,
                                                     "trim_offsets": True}}  # fmt: skip
    with pytest.raises(FormatError, match=r"pre_tokenizer cuts words like none of llama3, gpt2, digits"):
        save_gguf(tmp_path / "m.gguf", make_model().config, {}, Tokenizer(content, tokenizer.config))
    assert not list(tmp_path.iterdir())


def test_the_missing_package_is_named(monkeypatch, tmp_path, make_model):
    """With the command that installs it; reading needs no package."""
    model = make_model()
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    load_gguf(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"pip install 'entrenar\[gguf\]'$"):
        save_gguf(tmp_path / "n.gguf", model.config, model.state_dict(), None)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_of(keys: bytes, num_keys: int, tensors: bytes = b"", num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


def tensor_of(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HUGE = 1 << 60
DAMAGED = {
    "empty": (b"", r"is no GGUF file: it begins with b''$"),
    "another magic": (b"GGML" + bytes(60), r"is no GGUF file: it begins with b'GGML'$"),
    "version 1": (gguf_of(b"", 0, version=1), r"version must be 2 or 3 \(little-endian\), got 1$"),
    "big-endian": (gguf_of(b"", 0, version=3 << 24), r"version must be 2 or 3 \(little-endian\), got 50331648$"),
    "cut": (b"GGUF\x03\x00", r"version claims 4 bytes, 2 are left$"),
    "2^60 keys": (gguf_of(b"", HUGE), r"key 0 claims 8 bytes, 0 are left$"),
    "2^60 tensors": (gguf_of(b"", 0, num_tensors=HUGE), r"name of tensor 0 claims 8 bytes, 0 are left$"),
    "a key of 2^60 bytes": (gguf_of(struct.pack("<Q", HUGE), 1), r"key 0 claims 1152921504606846976 bytes, 0 are left"),
    "a list of 2^60 numbers": (
        gguf_of(text("a") + struct.pack("<IIQ", 9, 4, HUGE), 1), r"a claims 4611686018427387904 bytes, 0 are left$"
    ),
    "a list of 2^60 strings": (
        gguf_of(text("a") + struct.pack("<IIQ", 9, 8, HUGE), 1), r"a claims 1152921504606846976 strings, 0 bytes are"
    ),
    "lists in lists": (gguf_of(text("a") + struct.pack("<IIQ", 9, 9, 1), 1), r"a is a list of type 9, which is not"),
    "type 77": (gguf_of(text("a") + struct.pack("<I", 77), 1), r"a has type 77, which GGUF does not have$"),
    "a key twice": (gguf_of((text("a") + struct.pack("<IB", 0, 1)) * 2, 2), r"key 'a' is there twice$"),
    "a key that is no UTF-8": (gguf_of(struct.pack("<Q", 1) + b"\xff", 1), r"key 0 is not UTF-8: b'\\xff'$"),
    "a tensor twice": (gguf_of(b"", 0, tensor_of("a", [1]) * 2, 2), r"tensor 'a' is there twice$"),
    "five dimensions": (gguf_of(b"", 0, tensor_of("a", [1] * 5), 1), r"tensor a has 5 dimensions, GGUF has at most 4$"),
    "2^31 dimensions": (
        gguf_of(b"", 0, text("a") + struct.pack("<I", 1 << 31), 1), r"tensor a has 2147483648 dimensions"
    ),
    "Q4_K": (gguf_of(b"", 0, tensor_of("a", [256], 12), 1), r"tensor a is of GGML type 12; read are F32, F16, "),
    "a row of half a block": (gguf_of(b"", 0, tensor_of("a", [16], 8), 1), r"tensor a has rows of \[16\], no multiple"),
    "no dimensions": (gguf_of(b"", 0, tensor_of("a", []), 1), r"tensor a has rows of \[\], no multiple of"),
    "a tensor beyond the end": (gguf_of(b"", 0, tensor_of("a", [8]), 1) + bytes(31), r"tensor a ends at byte \d+, the"),
    "a tensor of 2^60": (gguf_of(b"", 0, tensor_of("a", [HUGE]), 1), r"tensor a ends at byte \d{19}, the file has"),
    "overlapping tensors": (
        gguf_of(b"", 0, tensor_of("a", [8]) + tensor_of("b", [8], offset=16), 2) + bytes(99),
        r"b begins at byte \d+, inside of tensor a$",
    ),
    "alignment 3": (
        gguf_of(text("general.alignment") + struct.pack("<II", 4, 3), 1),
        r"general\.alignment must be a power of two, got 3$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path, damage):
    """File and field, before memory is taken or a count is believed."""
    content, message = DAMAGED[damage]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_gguf(path)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gpt-2", r"general\.architecture must be 'llama', got 'gpt-2'$"),
        ("llama.block_count", 10**9, r"llama\.block_count: .*less than or equal to 16384$"),
        ("llama.block_count", 16000, r"holds \d+ tensors; llama\.block_count is 16000$"),
        ("llama.block_count", "x", r"llama\.block_count must be a number, got 'x'$"),
        ("llama.attention.head_count", 0, r"a LLaMA: llama\.attention\.head_count: .*greater than 0$"),
        ("llama.rope.dimension_count", 4, r"llama\.rope\.dimension_count must be the head width 8, got 4$"),
        ("llama.feed_forward_length", 65, r"tensor \S+ has shape \(.*64.*\), its header asks for \(.*65.*\)$"),
        ("llama.rope.scaling.type", "longrope", r"scaling\.type must be none, linear or yarn, got 'longrope'$"),
        ("tokenizer.ggml.model", "bert", r"tokenizer\.ggml\.model must be llama or gpt2, as a LLaMA's is, got 'bert'$"),
        ("tokenizer.ggml.tokens", [1, 2], r"tokenizer\.ggml\.tokens must be a list of str$"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], r"as many scores and kinds as tokens|token 2 repeats token 0, 'a'$"),
        ("tokenizer.ggml.bos_token_id", 5000, r"bos_id is 5000, but there are 512 tokens$"),
        ("tokenizer.ggml.bos_token_id", "x", r"bos_token_id.*valid integer|bos_token_id must be an id, got 'x'$"),
    ],
)
def test_a_hostile_key_is_refused(shared_data, tmp_path, make_model, monkeypatch, key, value, message):
    """What a header says is checked before it is believed."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    model = make_model(vocab_size=512)
    path = tmp_path / "model.gguf"
    honest = ours.architecture_metadata, ours.vocabulary_metadata

    def changed(keys: dict) -> dict:
        return {name: value if name == key else old for name, old in keys.items()}

    monkeypatch.setattr(ours, "architecture_metadata", lambda *a: changed({**honest[0](*a), **(
        {key: value} if key == "llama.rope.scaling.type" else {})}))  # fmt: skip
    monkeypatch.setattr(ours, "vocabulary_metadata", lambda *a: changed(honest[1](*a)))
    save_gguf(path, model.config, model.state_dict(), tokenizer, type_name="f32")
    if key == "general.architecture":
        path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"gpt-2", 1))
    with pytest.raises(FormatError, match=message) as caught:
        load_gguf(path)
    assert "model.gguf" in str(caught.value)


def test_nan_and_missing_and_foreign_tensors_are_refused(tmp_path, make_model):
    """By name."""
    model = make_model()
    weights = dict(model.state_dict())
    path = tmp_path / "model.gguf"
    save_gguf(path, model.config, weights | {"model.norm.weight": torch.full((32,), torch.nan)}, None, type_name="f32")
    with pytest.raises(FormatError, match=r"tensor model\.norm\.weight holds NaN or infinite weights$"):
        load_gguf(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_gguf(path, model.config, weights, None, type_name="f32")
    with pytest.raises(
        FormatError, match=r"lacks 1 tensors of the model, model\.layers\.1\.mlp\.up_proj\.weight first$"
    ):
        load_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(FormatError, match=r"holds tensor blk\.0\.ffn_xx\.weight, which a LLaMA does not have$"):
        load_gguf(path)
    path.write_bytes(content.replace(b"blk.0.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(FormatError, match=r"holds tensor model\.layers\.7\..*, which the architecture in its header"):
        load_gguf(path)


def test_other_rope_factors_than_llama3s_are_refused(tmp_path, make_model):
    """They cannot be expressed in config.json."""
    model = make_model(rope_scaling=LLAMA3, max_seq_len=65536)
    path = tmp_path / "model.gguf"
    save_gguf(path, model.config, model.state_dict(), None, type_name="f32")
    place = read_gguf(path).tensors["rope_freqs.weight"]
    content = bytearray(path.read_bytes())
    content[place.offset : place.offset + 16] = struct.pack("<4f", 3, 1, 2, 1)
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"rope_freqs\.weight is of no llama3 scaling"):
        load_gguf(path)


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_bytes_gives_a_model_or_our_error(tmp_path, make_model, data):
    """Flipped and cut files never raise anything else."""
    good = tmp_path / "good"
    if not good.exists():
        model = make_model(num_layers=1)
        tokenizer = train_bpe(["ab"], 259)
        config = model.config.model_copy(update={"vocab_size": 288})
        weights = dict(model.state_dict()) | {
            name: torch.zeros(288, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        save_gguf(good, config, weights, tokenizer, type_name="q8_0")
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(9000, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([3, 30, 500, 8000, len(content) - 1, len(content)]))])
    try:
        load_gguf(path)
    except EntrenarError as error:
        if "model.gguf" not in str(error) and str(tmp_path) not in str(error):
            raise

"""Whatever a GGUF file says is used as llama.cpp uses it, or refused by name: keys, dtypes, parts, cuts of words."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import torch

from entrenar.data import Tokenizer, train_bpe
from entrenar.data.tokenizer.vocabulary import WORD_PATTERNS, tokenizer_files
from entrenar.errors import FormatError, GateFailed
from entrenar.interop import gguf as ours
from entrenar.interop import source as source_module
from entrenar.interop.convert import Target, convert
from entrenar.interop.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from entrenar.interop.gguf_file import read_gguf
from entrenar.interop.gguf_metadata import architecture_metadata, read_architecture
from entrenar.interop.proof.read_gguf import read_gguf_file
from entrenar.interop.proof.verify import HARD_STRINGS
from entrenar.interop.source import open_source
from entrenar.interop.tokenizers import vocabulary_of
from entrenar.model import Llama, LlamaConfig, RopeScaling

package = pytest.importorskip("gguf")
CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=64
)
IDS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))


def model_with(**changes: object) -> Llama:
    """A model whose norms are no numbers of float16 or bfloat16, as a trained one's are not."""
    model = Llama(CONFIG.model_copy(update=changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + torch.randn(weight.shape, generator=generator) / 3)
            else:
                weight.mul_(8)
    return model


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a model of this shape with keys added, changed, or (None) left out."""

    def write(keys, model=None, type_name="f32", tokenizer=None):
        honest = ours.architecture_metadata
        changed = lambda config: {k: v for k, v in (honest(config) | keys).items() if v is not None}  # noqa: E731
        path = tmp_path / "model.gguf"
        model = model or model_with()
        with monkeypatch.context() as patch:
            patch.setattr(ours, "architecture_metadata", changed)
            save_gguf(path, model.config, model.state_dict(), tokenizer, type_name=type_name)
        return path

    return write


@torch.no_grad()
def logits(model: Llama) -> np.ndarray:
    return model(IDS).double().numpy()


LINEAR = RopeScaling(rope_type="linear", factor=4.0)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
OWN = 0.1 * np.log(4.0) + 1.0
USED = {
    "no type is linear": ({"rope.scaling.factor": 4.0}, LINEAR),
    "the key of old files": ({"rope.scale_linear": 4.0}, LINEAR),
    "the new key wins": ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, LINEAR),
    "type linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
    "type none has no factor": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    "a factor of 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    "a factor of 0 is none": ({"rope.scaling.factor": 0.0}, None),
    "finetuned changes nothing": ({"rope.scaling.finetuned": True}, None),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}, YARN),
    "yarn's attn_factor": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
         "rope.scaling.attn_factor": 0.7},
        YARN.model_copy(update={"attention_factor": OWN * 0.7})),
    "yarn's betas": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
         "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
        YARN.model_copy(update={"beta_fast": 8.0, "beta_slow": 2.0})),
    "no freq_base is 10000": ({"rope.freq_base": None}, None),
    "no dimension_count": ({"rope.dimension_count": None, "attention.key_length": None}, None),
    "keys as good as absent": ({"expert_count": 0, "logit_scale": 1.0, "attention.causal": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_a_key_is_used_as_llama_cpp_uses_it(write, name):
    """The logits are those of the scaling that the keys mean, by our model and by the independent reader."""
    keys, scaling = USED[name]
    path = write({f"llama.{key}": value for key, value in keys.items()})
    model, _ = load_gguf(path)
    expected = model_with(rope_scaling=scaling)
    assert np.abs(logits(model) - logits(expected)).max() < 1e-4
    assert np.abs(logits(model) - open_source(path).origin().logits(IDS)).max() < 1e-3


REFUSED = {
    "attn_factor without yarn": ({"rope.scaling.attn_factor": 0.7}, "rope.scaling.attn_factor = 0.69"),
    "longrope": ({"rope.scaling.type": "longrope"}, "scaling.type must be none, linear or yarn, got 'longrope'"),
    "a factor below 1": (
        {"rope.scaling.factor": 0.5},
        "llama.rope.scaling: Input should be greater than",
    ),
    "yarn's logarithm": ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier = .* is not supported"),
    "experts": ({"expert_count": 8}, "llama.expert_count = 8 changes what the model computes"),
    "a scale of logits": ({"logit_scale": 0.5}, "llama.logit_scale = 0.5 changes"),
    "a window": ({"attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096 changes"),
    "a key of tomorrow": ({"attention.sinks": 4}, "llama.attention.sinks = 4 changes"),
    "another vocabulary": ({"vocab_size": 98}, "llama.vocab_size is 98, but the embedding has 97 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_not_computed_is_refused_by_name(write, name):
    """Never passed over: it may change every logit."""
    keys, message = REFUSED[name]
    path = write({f"llama.{key}": value for key, value in keys.items()})
    with pytest.raises(FormatError, match=message):
        load_gguf(path)


@pytest.mark.parametrize(("type_name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_norms_stay_float32_beside_narrow_matrices(write, tmp_path, type_name, dtype):
    """Loaded, written as a folder and loaded again: rounding them would move a logit by a tenth."""
    model = model_with()
    path = write({}, model, type_name)
    loaded, _ = load_gguf(path)
    convert(open_source(path), Target(tmp_path / "folder", "hf"))
    for read in (loaded, open_source(tmp_path / "folder").model):
        assert read.dtype == dtype
        for name, weight in read.named_parameters():
            assert weight.dtype == (torch.float32 if name.endswith("norm.weight") else dtype)
            if name.endswith("norm.weight"):
                assert torch.equal(weight, model.get_parameter(name))
    assert np.abs(logits(loaded.float()) - open_source(path).origin().logits(IDS)).max() < 1e-3


def test_the_proof_finds_what_a_reader_lost(write, tmp_path, monkeypatch):
    """The written file is compared with the source's own numbers: rounded norms and a lost scaling are found."""
    path = write({"llama.rope.scaling.factor": 4.0}, type_name="bf16")
    honest = source_module.load_gguf

    def rounded(path):
        model, tokenizer = honest(path)
        model.model.norm.to(torch.bfloat16)
        return model, tokenizer

    monkeypatch.setattr(source_module, "load_gguf", rounded)
    with pytest.raises(GateFailed, match=r"^model\.norm\.weight differs by .* more than its rounding"):
        convert(open_source(path), Target(tmp_path / "no", "hf"))

    def unscaled(path):
        model, tokenizer = honest(path)
        model.config = model.config.model_copy(update={"rope_scaling": None})
        return model, tokenizer

    monkeypatch.setattr(source_module, "load_gguf", unscaled)
    with pytest.raises(GateFailed, match=r"yet its logits differ by .*: what it says of the architecture is wrong"):
        convert(open_source(path), Target(tmp_path / "no", "hf"))


def split(path, counts=(7, 13)):
    """Cut a file into parts as gguf-split does."""
    reader = package.GGUFReader(path)
    names = [t.name for t in reader.tensors]
    ends = [*counts, len(names)]
    paths = []
    for number, (start, stop) in enumerate(zip([0, *counts], ends, strict=True)):
        part = path.with_name(f"parts-{number + 1:05d}-of-{len(ends):05d}.gguf")
        writer = package.GGUFWriter(part, "llama")
        for key, value in ({"split.no": number, "split.count": len(ends), "split.tensors.count": len(names)}).items():
            writer.add_uint16(key, value) if key != "split.tensors.count" else writer.add_int32(key, value)
        for field in reader.fields.values() if number == 0 else ():
            if field.name.startswith("llama.") and len(field.types) == 1:
                writer.add_key_value(field.name, field.contents(), field.types[0])
        for tensor in reader.tensors[start:stop]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(part)
    return paths


def test_a_split_file_is_read_from_its_first_part(write, tmp_path):
    """All tensors of all parts; converted, it is proved against the parts."""
    whole = write({})
    first, second, third = split(whole)
    assert np.array_equal(logits(load_gguf(first)[0]), logits(load_gguf(whole)[0]))
    report = convert(open_source(first), Target(tmp_path / "folder", "hf"))
    assert max(report.tensor_errors.values()) == 0
    with pytest.raises(FormatError, match=r"is one of 3 parts; give the first, named like parts-00001-of-00003\.gguf"):
        load_gguf(second)
    third.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(FormatError, match=r"first of 3 parts, and parts-00003-of-00003\.gguf is not next to it"):
        load_gguf(first)
    second.rename(third)
    second.write_bytes(third.read_bytes())
    with pytest.raises(FormatError, match=r"has split\.no 1; it is not part 3|holds tensor .* again"):
        load_gguf(first)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the cat's 1234 naïve CamelCase words, don't 3.14159 == x**2\n\n  two  spaces 漢字 " * 20
    return train_bpe([text, *HARD_STRINGS], 400)


@pytest.mark.parametrize("pattern", WORD_PATTERNS)
def test_every_cut_of_words_survives_a_file(tmp_path, tokenizer, pattern):
    """By its published name, with ids that llama.cpp's own patterns give, both ways."""
    vocabulary = dataclasses.replace(vocabulary_of(tokenizer), pattern=pattern)
    cut = Tokenizer(*tokenizer_files(vocabulary, "test"), "test")
    model = model_with(vocab_size=max(400, cut.vocab_size))
    save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), cut)
    read, independent = load_gguf_tokenizer(read_gguf(tmp_path / "m.gguf")), read_gguf_file(tmp_path / "m.gguf")
    assert vocabulary_of(read).pattern == pattern
    for text in (*HARD_STRINGS, "room 101, 2024-11-26", "ΑΒΓ αβγ ÀÉÎ o'clock O'NEIL"):
        assert cut.encode(text) == read.encode(text) == independent.encode(text), text


def test_smollm_s_digits_are_those_of_its_own_tokenizer(tokenizer):
    """Its published pre-tokenizer, Digits then ByteLevel, cuts as the pattern of GGUF does, and has its name."""
    vocabulary = dataclasses.replace(vocabulary_of(tokenizer), pattern="digits")
    cut = Tokenizer(*tokenizer_files(vocabulary, "test"), "test")
    backend = tokenizers.Tokenizer.from_str(json.dumps(cut.content))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.encode_special_tokens = True
    for text in (*HARD_STRINGS, "in 2024, 12 of 3456"):
        assert cut.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


def test_tokens_that_end_a_turn_end_a_text(tmp_path):
    """The keys eos, eot and eom, and the control tokens that every program ends at, all of them."""
    keys = {
        **architecture_metadata(CONFIG), "general.architecture": "llama",
        "tokenizer.ggml.tokens": [*map(str, range(95)), "<|im_end|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": [1] * 95 + [3, 1],
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7,
    }  # fmt: skip
    assert read_architecture(tmp_path, keys, 97, is_tied=False, factors=None).eos_token_id == (2, 7, 95)

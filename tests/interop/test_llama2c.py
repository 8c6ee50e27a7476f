"""llama2.c's files: published ones give the published text, ours are read by a forward that is not ours."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.errors import EntrenarError, FormatError
from entrenar.infer import GenerateConfig, generate
from entrenar.interop.llama2c import load_llama2c, quantize_q8_0, read_header, save_llama2c
from entrenar.model import RopeScaling

_spec = importlib.util.spec_from_file_location("llama2c_forward", Path(__file__).with_name("llama2c_forward.py"))
llama2c_forward = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(llama2c_forward)


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_stories260k_writes_the_published_text(shared_data, name):
    """200 greedy tokens from BOS are the text that llama2.c publishes, byte for byte."""
    folder = shared_data / "models" / "stories260K"
    model = load_llama2c(folder / name)
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    steps = generate(model, [[1]], GenerateConfig(max_new_tokens=200, temperature=0, eos_token_ids=(1,)))
    tokens = [token for (token,) in steps]
    assert tokenizer.decode(tokens).encode() == (folder / "expected_greedy_200.txt").read_bytes()


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_stories260k_gives_the_reference_logits(shared_data, name):
    """Within 1e-4 of two other implementations."""
    reference = np.load(shared_data / "models/stories260K_hf/reference_logits.npz")
    ids = torch.from_numpy(reference["prompt_ids"]).long().view(1, -1)
    with torch.no_grad():
        logits = load_llama2c(shared_data / "models/stories260K" / name)(ids)[0].numpy()
    for key in ("logits_hf_fp32", "logits_numpy_fp64"):
        assert np.abs(logits - reference[key].reshape(logits.shape)).max() < 1e-4


def test_both_versions_of_stories260k_are_one_model(shared_data):
    """Version 0 and version 1 of the same export hold the same numbers."""
    old, new = (
        load_llama2c(shared_data / "models/stories260K" / name).state_dict()
        for name in ("stories260K.bin", "stories260K_v1.bin")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(("version", "name"), [(0, "stories260K.bin"), (1, "stories260K_v1.bin")])
def test_what_is_written_equals_the_published_file(shared_data, tmp_path, version, name):
    """Both versions of the trained model, byte for byte."""
    published = shared_data / "models/stories260K" / name
    model = load_llama2c(published)
    save_llama2c(tmp_path / "model.bin", model.config, model.state_dict(), version=version)
    assert (tmp_path / "model.bin").read_bytes() == published.read_bytes()


def test_tok105_loss_is_near_the_published_one(shared_data):
    """Loss of the published character-level model on TinyStories, in nats a character.

    Published is 0.7366 on a validation shard of the first TinyStories, which we do not have. Ours is every 28th of 2725
    stories, part of them of the second TinyStories (another author), prepared as llama2.c does: stripped, BOS before
    each, one stream, windows of 256, a newline is <unk>. Other text, so the same to about a tenth: 0.81 is measured.
    A model whose layout is read wrong is above 3.
    """
    model = load_llama2c(shared_data / "models/tok105_5000/model.bin")
    tokenizer = Tokenizer.load(shared_data / "models/tok105_5000/tok105.model")
    text = (shared_data / "text/tinystories_train.txt").read_text("utf-8")
    stories = text.split("<|endoftext|>")[::28]
    tokens = [token for story in stories for token in tokenizer.encode(story.strip(), bos=True)]
    rows = torch.tensor(tokens[: len(tokens) // 257 * 257]).view(-1, 257)
    with torch.no_grad():
        loss = model.loss(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
    assert loss.item() == pytest.approx(0.7366, abs=0.1)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_foreign_forward_reads_what_is_written(tmp_path, make_model, input_ids, is_tied, version):
    """The numpy forward of the tests, on our file, gives our logits (for Q8_0 those of the quantized weights)."""
    model = make_model(tie_word_embeddings=is_tied)
    path = tmp_path / "model.bin"
    save_llama2c(path, model.config, model.state_dict(), version=version)
    back = load_llama2c(path)
    with torch.no_grad():
        ours, source = back(input_ids[:1])[0].numpy(), model(input_ids[:1])[0].numpy()
    theirs = llama2c_forward.logits(path, input_ids[0].tolist())
    assert np.abs(ours - theirs).max() < 1e-5
    if version == 2:
        assert np.abs(ours - source).max() < 0.02 * np.abs(source).max()
    else:
        assert np.array_equal(ours, source)


def test_a_foreign_forward_reads_the_published_files(shared_data):
    """The oracle itself reproduces the reference, on both published versions."""
    reference = np.load(shared_data / "models/stories260K_hf/reference_logits.npz")
    prompt = reference["prompt_ids"].reshape(-1)
    for name in ("stories260K.bin", "stories260K_v1.bin"):
        found = llama2c_forward.logits(shared_data / "models/stories260K" / name, prompt)
        assert np.abs(found - reference["logits_numpy_fp64"].reshape(found.shape)).max() < 1e-4


def test_q8_0_is_within_half_a_step():
    """Also for groups of zeros, which have no step, and for the largest number."""
    tensor = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    tensor[0] = 0
    numbers, scales = quantize_q8_0(tensor, 32)
    error = (numbers * scales[:, None] - tensor.reshape(-1, 32)).abs().amax(dim=1)
    assert (error <= scales * 0.5001).all()
    assert numbers.abs().amax(dim=1).tolist() == [0, 0] + [127] * 14


def test_the_group_divides_both_widths(tmp_path, make_model):
    """A group that crossed a row would be read wrong by llama2.c's program."""
    model = make_model(intermediate_size=44)
    save_llama2c(tmp_path / "model.bin", model.config, model.state_dict(), version=2)
    assert read_header(tmp_path / "model.bin").group_size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rms_norm_eps": 1e-6},
            r"^llama2\.c has rms_norm_eps = 1e-05 in its program, the model has 1e-06; convert to",
        ),
        ({"rope_theta": 5e5}, r"^llama2\.c has rope_theta = 10000\.0 in its program"),
        ({"rope_scaling": RopeScaling(rope_type="linear", factor=2)}, r"^llama2\.c has rope_scaling = None"),
        ({"head_dim": 16}, r"^llama2\.c has head_dim = 8 in its program, the model has 16"),
    ],
)
def test_what_llama2c_cannot_say_is_refused(tmp_path, make_model, changes, message):
    """Its program has these fixed."""
    model = make_model(**changes)
    with pytest.raises(FormatError, match=message):
        save_llama2c(tmp_path / "model.bin", model.config, model.state_dict())


def changed(content: bytes, at: int, *numbers: int) -> bytes:
    return content[:at] + struct.pack(f"<{len(numbers)}i", *numbers) + content[at + 4 * len(numbers) :]


DAMAGE = {
    "empty": (lambda _: b"", r"is no llama2\.c file: it has 0 bytes, its header 28$"),
    "wrong magic": (lambda c: b"GGUF" + c[4:], r"model\.bin: .*no llama2\.c file"),
    "version 7": (lambda c: changed(c, 4, 7), r"version must be 0, 1 or 2, got 7$"),
    "header cut": (lambda c: c[:100], r"ends in the middle of its header, after 100 of 256 bytes$"),
    "weights cut": (lambda c: c[:-1], r"a version 1 file of this header has \d+ bytes, got \d+$"),
    "weights left over": (lambda c: c + b"\0", r"a version 1 file of this header has \d+ bytes, got \d+$"),
    "negative dim": (lambda c: changed(c, 8, -32), r"hidden_size Input should be greater than 0"),
    "no heads": (lambda c: changed(c, 20, 0), r"dim must be a multiple of n_heads > 0, got 32 and 0"),
    "2 billion layers": (lambda c: changed(c, 16, 2**31 - 1), r"num_layers Input should be less than .* 16384"),
    "another vocabulary": (lambda c: changed(c, 28, 2**24), r"this header has \d{9,} bytes, got"),
    "head's byte": (lambda c: c[:36] + b"\x05" + c[37:], r"the head's byte must be 0 or 1 .* got 5"),
    "NaN": (
        lambda c: c[:300] + struct.pack("<f", float("nan")) + c[304:], r"tensor \S+ holds NaN or infinite weights$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, make_model, damage):
    """File and field, before memory is taken."""
    model = make_model()
    path = tmp_path / "model.bin"
    save_llama2c(path, model.config, model.state_dict(), version=1)
    harm, message = DAMAGE[damage]
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as caught:
        load_llama2c(path)
    assert "model.bin" in str(caught.value)


def test_a_group_size_that_does_not_fit_is_refused(tmp_path, make_model):
    """Version 2 only."""
    model = make_model()
    path = tmp_path / "model.bin"
    save_llama2c(path, model.config, model.state_dict(), version=2)
    content = path.read_bytes()
    for group, message in ((0, "group size > 0, got 0, 0"), (7, r"group size must divide dim and hidden_dim, got 7")):
        path.write_bytes(content[:37] + struct.pack("<i", group) + content[41:])
        with pytest.raises(FormatError, match=message):
            load_llama2c(path)


@pytest.mark.fuzz
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_bytes_gives_a_model_or_our_error(tmp_path, make_model, data):
    """Flipped and cut files never raise anything else."""
    path = tmp_path / "model.bin"
    if not path.exists():
        model = make_model(num_layers=1)
        save_llama2c(path, model.config, model.state_dict(), version=2)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([0, 5, 40, 255, len(content) - 1, len(content)]))])
    try:
        load_llama2c(path)
    except EntrenarError as error:
        if "model.bin" not in str(error):
            raise

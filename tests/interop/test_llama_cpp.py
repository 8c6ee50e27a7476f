"""llama.cpp itself reads what is written for it: its logits, its tokens. Skipped where it is not installed."""

import numpy as np
import pytest
import torch

from entrenar.data import Tokenizer
from entrenar.infer import GenerateConfig, generate
from entrenar.interop.gguf import load_gguf, save_gguf
from entrenar.interop.llama2c import load_llama2c
from entrenar.interop.proof.verify import HARD_STRINGS
from entrenar.model import RopeScaling

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not here: pip install llama-cpp-python (it compiles)")
F32 = 0  # GGML's number of the type


def read(path, **options):
    """Open a file in llama.cpp, one thread, keys and values in float32."""
    options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False} | options
    return llama_cpp.Llama(str(path), type_k=F32, type_v=F32, **options)


def logits_of(model, ids):
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_stories260k_speaks_the_same_in_llama_cpp(shared_data, tmp_path, type_name):
    """60 greedy tokens are ours; in float32 the logits too (blocks are multiplied with rounded activations there)."""
    source = load_llama2c(shared_data / "models/stories260K/stories260K.bin")
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    path = tmp_path / "model.gguf"
    save_gguf(path, source.config, source.state_dict(), tokenizer, type_name=type_name)
    ours, theirs = load_gguf(path)[0].float(), read(path)
    prompt = tokenizer.encode("Once upon a time", bos=True)
    steps = generate(ours, [prompt], GenerateConfig(max_new_tokens=60, temperature=0, eos_token_ids=()))
    tokens = [token for (token,) in steps]
    logits = logits_of(theirs, prompt + tokens)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    if type_name == "f32":
        with torch.no_grad():
            expected = ours(torch.tensor([prompt + tokens]))[0].numpy()
        assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_kv_heads": 1, "rms_norm_eps": 1e-2},
        {"rope_theta": 5e5},
        {"rope_scaling": RopeScaling(rope_type="linear", factor=2)},
        {"rope_scaling": RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=16)},
        {
            "rope_scaling": RopeScaling(
                rope_type="llama3",
                factor=8,
                low_freq_factor=1,
                high_freq_factor=4,
                original_max_position_embeddings=32,
            )
        },
    ],
    ids=["tied", "mqa", "theta", "linear", "yarn", "llama3"],
)
def test_architectures_give_our_logits(shared_data, tmp_path, make_model, changes):
    """Heads, norms, rotary scalings: what the header says is what llama.cpp computes."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin")
    model = make_model(vocab_size=512, initializer_range=0.2, **changes)
    save_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, type_name="f32")
    ids = torch.randint(3, 512, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)[0].numpy()
    assert np.abs(logits_of(read(tmp_path / "model.gguf", n_ctx=64), ids[0].tolist()) - ours).max() < 1e-4


@pytest.mark.parametrize(
    "source",
    ["tok512/tok512.bin", "llama2/tokenizer.model", "llama2_hf", "llama3_style_small/tiktoken_small.model"],
)
def test_tokenizers_agree_on_hard_strings(shared_data, tmp_path, make_model, source):
    """llama.cpp's own tokenizer, from our metadata, gives the ids of ours."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / source)
    model = make_model(vocab_size=tokenizer.vocab_size)
    save_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, type_name="f16")
    theirs = read(tmp_path / "model.gguf", vocab_only=True)
    differing = {
        text: (theirs.tokenize(text.encode(), add_bos=False, special=False), tokenizer.encode(text))
        for text in HARD_STRINGS
        if theirs.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text)
    }
    assert not differing

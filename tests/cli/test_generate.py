"""Writing on in the terminal: whatever format the model is in, and however many prompts there are."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.data import PrepareConfig, Tokenizer, prepare
from entrenar.errors import DataError
from entrenar.interop import hf, hf_files, save_model
from entrenar.model import Llama, LlamaConfig

PROMPTS = ("one", "three four five", "a", "seven")
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small corpus with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("words")
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five", "seven"], size=(200, 20))
    (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    config = PrepareConfig(vocab_size=300, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", config)
    return folder / "corpus"


@pytest.fixture(scope="module")
def make_folder(corpus, tmp_path_factory):
    """Write a tiny random model as a Hugging Face folder; keywords change its config, and how large a shard is."""

    def make(max_shard_bytes: int = hf.MAX_SHARD_BYTES, **changes) -> Path:
        folder: Path = tmp_path_factory.mktemp("model")
        tokenizer = Tokenizer.load(corpus)
        size = {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 64,
            "max_seq_len": 64,
        }
        config = LlamaConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **(size | changes))
        model = Llama(config)
        model.init_weights(torch.Generator().manual_seed(0))
        save_model(folder, config, model.state_dict(), max_shard_bytes=max_shard_bytes)
        tokenizer.save(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder) -> Path:
    """The model as a Hugging Face folder."""
    path: Path = make_folder()
    return path


def written(model: Path, capsys, *prompts: str, **flags: object) -> str:
    """What the command writes, always the likeliest tokens unless told otherwise."""
    options = {"max_new_tokens": 12, "temperature": 0, "threads": 1} | flags
    words = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["generate", str(model), *words, "--prompt", *prompts]) == 0
    text: str = capsys.readouterr().out
    return text


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_every_format_writes_the_same_text_and_has_the_same_loss(kind, folder, corpus, tmp_path, capsys):
    """A converted model is opened as it is by generate and by eval, which finds the corpus' own tokenizer in it."""
    target = tmp_path / "converted"
    assert main(["convert", str(folder), str(target), "--to", kind, "--dtype", "f32"]) == 0
    losses = []
    for model in (folder, target):
        capsys.readouterr()
        assert main(["eval", str(model), "--corpus", str(corpus), "--json", "--threads", "1"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
        assert written(model, capsys, "one two") == written(folder, capsys, "one two")
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_llama2c_is_opened_as_folder_and_as_file(shared_data, tmp_path, capsys):
    """The published story, through the command; the tokenizer is the one beside the weights."""
    source, target = shared_data / "models/stories260K/stories260K.bin", tmp_path / "stories"
    tokenizer = shared_data / "tokenizers/tok512/tok512.bin"
    assert main(["convert", str(source), str(target), "--to", "llama2c", "--tokenizer", str(tokenizer)]) == 0
    capsys.readouterr()
    story = (shared_data / "models/stories260K/expected_greedy_200.txt").read_text("utf-8")
    for model in (target, target / "model.bin"):
        assert story.startswith(written(model, capsys, "Once upon a time", max_new_tokens=60).strip())


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"max_shard_bytes": 20_000}, {"rope_scaling": LLAMA_3_1, "max_seq_len": 128}],
    ids=["tied", "in shards", "LLaMA 3.1's angles"],
)
def test_folders_of_every_kind_go_to_gguf_and_come_back(changes, make_folder, tmp_path, capsys):
    """Their text through the command is the same before and after, past the length that the angles were made for."""
    source = make_folder(**changes)
    assert (source / hf_files.INDEX_FILE).is_file() == ("max_shard_bytes" in changes)
    assert main(["convert", str(source), str(tmp_path / "there.gguf"), "--to", "gguf"]) == 0
    assert main(["convert", str(tmp_path / "there.gguf"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert hf.read_config(tmp_path / "back").rope_scaling == hf.read_config(source).rope_scaling
    capsys.readouterr()
    wanted = written(source, capsys, "one two", max_new_tokens=40)
    for model in (tmp_path / "there.gguf", tmp_path / "back"):
        assert written(model, capsys, "one two", max_new_tokens=40) == wanted


def test_prompts_continued_together_get_the_text_that_each_gets_alone(folder, capsys):
    """Each under its number, more of them than are continued at once included."""
    prompts = PROMPTS * 5
    alone = {prompt: written(folder, capsys, prompt) for prompt in PROMPTS}
    assert written(folder, capsys, *prompts) == "\n".join(
        f"--- {number} ---\n{alone[prompt]}" for number, prompt in enumerate(prompts, 1)
    )


def test_control_tokens_in_a_prompt_are_text_unless_asked_for(folder, monkeypatch, capsys):
    """The note names the token; --allow-special reads it, and adds no second token at the start."""
    prompts = []

    def generate(_model, ids, *_, **__):
        prompts.extend(ids)
        return iter(())

    monkeypatch.setattr(sys.modules["entrenar.infer.complete"], "generate", generate)
    tokenizer, words = Tokenizer.load(folder), ["generate", str(folder), "--prompt", "<|bos|>one"]
    assert main(words) == 0
    assert "the prompt spells <|bos|>, read as plain text; --allow-special reads" in capsys.readouterr().err
    assert main([*words, "--allow-special"]) == 0
    assert "read as plain text" not in capsys.readouterr().err
    assert prompts == [tokenizer.encode("<|bos|>one", bos=True), tokenizer.encode("one", bos=True)]
    assert prompts[0] != prompts[1]


def test_prompts_are_read_by_the_model_at_once(folder, monkeypatch, capsys):
    """Four prompts are one pass through the model."""
    shapes = []
    hidden = Llama.hidden

    def counted(self, input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return hidden(self, input_ids, **options)

    monkeypatch.setattr(Llama, "hidden", counted)
    written(folder, capsys, *PROMPTS)
    assert [shape[0] for shape in shapes] == [4]


def test_a_prompt_at_the_end_of_the_context_does_not_shorten_the_others(folder, capsys):
    """The rows of a batch have each their own room."""
    long = "one " * 60
    room = 64 - len(Tokenizer.load(folder).encode(long, bos=Tokenizer.load(folder).add_bos))
    assert 0 < room < 12
    short = written(folder, capsys, "one")
    assert written(folder, capsys, long, "one").endswith(f"--- 2 ---\n{short}")


def test_a_file_without_tokenizer_says_how_it_gets_one(folder, tmp_path, capsys):
    """Exit code 2; the command that is named mends it."""
    assert main(["convert", str(folder), str(tmp_path / "bin"), "--to", "llama2c"]) == 2
    assert "got family bytes, ids (None, 0, 1); convert to gguf, or leave the tokenizer out (--no-tokenizer)" in (
        capsys.readouterr().err
    )
    assert main(["convert", str(folder), str(tmp_path / "bin"), "--to", "llama2c", "--no-tokenizer"]) == 0
    lone = tmp_path / "lone.bin"
    shutil.copy(tmp_path / "bin" / "model.bin", lone)
    capsys.readouterr()
    assert main(["generate", str(lone), "--prompt", "one"]) == 2
    remedy = f"convert {lone} DIR --to hf --tokenizer FILE"
    assert f"comes without a tokenizer; add one: entrenar {remedy}" in capsys.readouterr().err
    mended = tmp_path / "mended"
    words = remedy.replace("DIR", str(mended)).replace("FILE", str(folder / "tokenizer.json")).split()
    assert main(words) == 0
    capsys.readouterr()
    assert written(mended, capsys, "one") == written(folder, capsys, "one")


def test_what_must_be_a_folder_says_so_of_a_file(folder, tmp_path):
    """A model that is to be trained further is a folder; the way there is named."""
    file = tmp_path / "model.gguf"
    assert main(["convert", str(folder), str(file), "--to", "gguf"]) == 0
    with pytest.raises(
        DataError,
        match=rf"model\.gguf must be a model folder, got a single file; convert it: entrenar convert {file} DIR",
    ):
        recipe.model_folder(file)


def test_a_dtype_is_that_of_every_format(folder, tmp_path):
    """Without one, the file's own."""
    file = tmp_path / "model.gguf"
    assert main(["convert", str(folder), str(file), "--to", "gguf", "--dtype", "bf16"]) == 0
    assert recipe.open_model(file)[0].dtype == torch.bfloat16
    assert recipe.open_model(file, dtype=torch.float32)[0].dtype == torch.float32

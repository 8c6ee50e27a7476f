"""llama2.c's own programs read what is written for them.

Skipped unless `runq` is on PATH, with `run` beside it:

    git clone https://github.com/karpathy/llama2.c && cd llama2.c
    gcc -O3 -o run run.c -lm && gcc -O3 -o runq runq.c -lm
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from entrenar.data import Tokenizer
from entrenar.infer import GenerateConfig, complete
from entrenar.interop.llama2c import load_llama2c, save_llama2c
from entrenar.interop.tokenizers import tokenizer_bin


@pytest.fixture(scope="module")
def programs():
    """The folder of `run` and `runq`."""
    runq = shutil.which("runq")
    if runq is None or not Path(runq).with_name("run").is_file():
        pytest.skip("llama2.c's programs are not here: runq on PATH with run beside it (see this file's first lines)")
    return Path(runq).parent


@pytest.fixture
def stories(shared_data):
    """The trained model and its tokenizer."""
    return (
        load_llama2c(shared_data / "models/stories260K/stories260K.bin"),
        Tokenizer.load(shared_data / "tokenizers/tok512/tok512.bin"),
    )


def written_by(program, folder, prompt, steps):
    """Return what a program writes after a prompt, the likeliest tokens."""
    command = [program, folder / "model.bin", "-t", "0", "-n", str(steps), "-z", folder / "tokenizer.bin"]
    return subprocess.run([*command, "-i", prompt], check=True, capture_output=True, timeout=60).stdout


def export(folder, model, tokenizer, version):
    save_llama2c(folder / "model.bin", model.config, model.state_dict(), version=version)
    (folder / "tokenizer.bin").write_bytes(tokenizer_bin(tokenizer, model.config.vocab_size))


def test_run_writes_the_published_text(programs, stories, shared_data, tmp_path):
    """From version 0, byte for byte; the program ends with a newline."""
    export(tmp_path, *stories, version=0)
    published = (shared_data / "models/stories260K/expected_greedy_200.txt").read_bytes()
    assert written_by(programs / "run", tmp_path, "", 200) == published + b"\n"


@pytest.mark.parametrize("prompt", ["Once upon a time", "  two spaces", "naïve café 漢字 🙂", "The cat, 3.14!\n\nSo"])
def test_run_goes_on_like_us(programs, stories, tmp_path, prompt):
    """It reads prompts by our tokenizer.bin, and writes on as we do."""
    model, tokenizer = stories
    export(tmp_path, *stories, version=0)
    steps = 120
    found = written_by(programs / "run", tmp_path, prompt, steps)
    # it counts the prompt's tokens, begins with BOS, and ends before the text where BOS comes next
    num_new = steps - len(tokenizer.encode(prompt, bos=True)) + 1
    config = GenerateConfig(max_new_tokens=num_new, temperature=0, eos_token_ids=(1,))
    (ours,) = complete(model, tokenizer, [prompt], config)
    # of the prompt it prints no lone bytes
    assert len(ours.token_ids) > 20
    assert found.decode("utf-8").removesuffix("\n").endswith(ours.text)


def test_runq_tells_a_story(programs, stories, tmp_path):
    """Version 2: it rounds activations too, so its words may differ from ours later, not at the beginning."""
    _, tokenizer = stories
    export(tmp_path, *stories, version=2)
    found = written_by(programs / "runq", tmp_path, "Once upon a time", 60).decode()
    config = GenerateConfig(max_new_tokens=30, temperature=0)
    (ours,) = complete(load_llama2c(tmp_path / "model.bin"), tokenizer, ["Once upon a time"], config)
    assert found.startswith("Once upon a time" + ours.text)

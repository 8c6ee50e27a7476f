"""Whatever is typed behind a flag, only our own errors come out, each with a sentence and an exit code."""

import random

import pytest
from command_lines import CODES, command_lines, ending

COMMANDS = {
    ("train",): ["--corpus", "nowhere"],
    ("finetune",): ["--model", "nowhere", "--data", "nowhere"],
    ("generate",): ["nowhere", "--prompt", "a"],
    ("eval",): ["nowhere", "--corpus", "nowhere"],
    ("convert",): ["nowhere", "out", "--to", "hf"],
    ("merge",): ["nowhere", "nowhere-else", "out"],
    ("prepare",): ["nowhere", "--out", "out"],
    ("data", "check"): ["nowhere"],
    ("config", "print"): [],
}
SAMPLE = 60


@pytest.mark.fuzz
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_flag_brings_a_traceback(tmp_path, command):
    """A sample of flags with no value, empty, huge, negative, non-finite, non-UTF-8 and markup-like ones."""
    lines = list(command_lines({command: COMMANDS[command]}))
    for words in random.Random(len(lines)).sample(lines, min(SAMPLE, len(lines))):
        code, said = ending(words, tmp_path)
        assert code in CODES, words
        assert said.strip() or code in (0, 1), words
        assert "Traceback" not in said, words

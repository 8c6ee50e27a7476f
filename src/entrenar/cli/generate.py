"""`entrenar generate MODEL --prompt TEXT`: continue prompts, the text appearing as it is written."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from entrenar import recipe
from entrenar.cli import flags
from entrenar.infer import GenerateConfig, stream

_OWN = ("eos_token_ids",)


def run(words: Sequence[str]) -> int:
    """Generate; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    config = flags.from_fields(parsed, GenerateConfig)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    model, tokenizer = recipe.open_model(parsed.model, dtype=torch.float32)
    prompts = parsed.prompt or [sys.stdin.read()]
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} ---")
        sys.stdout.write(prompt)
        for text in stream(model, tokenizer, prompt, config):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("generate", "Continue a prompt.")
    arguments.add_argument("model", type=Path, help="a run, a checkpoint or a model folder")
    arguments.add_argument("--prompt", nargs="+", help="one or more prompts; standard input when not given")
    arguments.add_argument("--threads", type=flags.positive, help="CPU threads")
    flags.add_field_flags(arguments, GenerateConfig, leave_out=_OWN)
    return arguments

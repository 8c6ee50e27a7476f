"""`entrenar generate MODEL --prompt TEXT …`: continue prompts, and print the first one's text while generating.

Several prompts are continued together: a token for each of them costs little more than one token.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar import infer, recipe
from entrenar.cli import flags
from entrenar.infer import GenerateConfig

if TYPE_CHECKING:
    from entrenar.data import Tokenizer

_OWN = ("eos_token_ids", "allow_special")
_TOGETHER = 16


def run(words: Sequence[str]) -> int:
    """Generate; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    config = flags.from_fields(parsed, GenerateConfig)
    import torch  # noqa: PLC0415  # seconds, which neither --help nor a usage error needs

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    model, tokenizer = recipe.open_model(parsed.model, dtype=torch.float32)
    if parsed.eos is not None:
        ends = infer.named_tokens(tokenizer, parsed.eos, model.config.vocab_size)
        config = config.model_copy(update={"eos_token_ids": ends})
    prompts = parsed.prompt or [sys.stdin.read()]
    if parsed.allow_special:
        config = config.model_copy(update={"allow_special": True})
    else:
        _note_control_tokens(prompts, tokenizer)
    for start in range(0, len(prompts), _TOGETHER):
        some = prompts[start : start + _TOGETHER]
        steps = infer.stream_rows(model, tokenizer, some, config)
        titles = [f"--- {start + row} ---\n" if len(prompts) > 1 else "" for row in range(1, len(some) + 1)]
        _write(steps, [title + prompt for title, prompt in zip(titles, some, strict=True)], is_first=start == 0)
    return 0


def _note_control_tokens(prompts: Sequence[str], tokenizer: "Tokenizer") -> None:
    """Print a note on standard error if a prompt spells control tokens: they stay plain text."""
    names = [tokenizer.name_of(index) for index in sorted(tokenizer.special_ids)]
    found = next((name for prompt in prompts for name in names if name in prompt), None)
    if found is not None:
        print(f"note: the prompt spells {found}, read as plain text; --allow-special reads the token", file=sys.stderr)


def _write(steps: Iterable[list[str]], prompts: Sequence[str], *, is_first: bool) -> None:
    """Write the first text piece by piece, then the others, complete by then."""
    sys.stdout.write(f"{'' if is_first else chr(10)}{prompts[0]}")
    others: list[list[str]] = [[prompt] for prompt in prompts[1:]]
    for first, *rest in steps:
        sys.stdout.write(first)
        sys.stdout.flush()
        for text, piece in zip(others, rest, strict=True):
            text.append(piece)
    sys.stdout.write("\n")
    for text in others:
        sys.stdout.write(f"\n{''.join(text)}\n")


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("generate", "Continue a prompt.")
    arguments.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, a .gguf or a .bin")
    arguments.add_argument(
        "--prompt", nargs="+", help="one or more prompts, continued together (default: standard input)"
    )
    arguments.add_argument(
        "--eos", nargs="+", metavar="TOKEN", help="names or ids of the tokens that end the text (default: the model's)"
    )
    arguments.add_argument(
        "--allow-special", action="store_true", help="read control tokens that a prompt spells, such as <s>, as tokens"
    )
    arguments.add_argument("--threads", type=flags.thread_count, help="CPU threads")
    flags.add_field_flags(arguments, GenerateConfig, leave_out=_OWN)
    return arguments

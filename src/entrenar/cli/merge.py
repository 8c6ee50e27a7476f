"""`entrenar merge BASE ADAPTER OUT`: merge an adapter into the weights of its base, and show what that changed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar.cli import flags
from entrenar.cli.next_step import generate_command, tell_next

if TYPE_CHECKING:
    from entrenar.interop.hf_peft import BaseIdentity
    from entrenar.peft import MergeReport

_DTYPES = ("float32", "bfloat16", "float16")


def run(words: Sequence[str]) -> int:
    """Merge; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    import torch  # noqa: PLC0415  # seconds, which neither --help nor a usage error needs

    from entrenar.recipe.merge import MergeOptions, merge_adapter  # noqa: PLC0415

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    options = MergeOptions(
        dtype=getattr(torch, parsed.dtype) if parsed.dtype else None,
        refuse_above=parsed.refuse_if,
        probe=parsed.probe,
        probe_tokens=parsed.probe_tokens,
        is_other_base_allowed=parsed.other_base,
        overwrite=parsed.overwrite,
    )
    merged = merge_adapter(parsed.base, parsed.adapter, parsed.out, options)
    print("\n".join(_lines(merged.report, parsed.out)))
    if merged.quantized_base is not None:
        print(f"the adapter was trained over this base in {_own_model(merged.quantized_base)};")
        print("an adapter that started from LoftQ makes up for that rounding, and belongs over the rounded model only")
    tell_next(generate_command(parsed.out))
    return 0


def _own_model(base: "BaseIdentity") -> str:
    if base.is_within_budget:
        return f"a budget of bits: its own model is {base.name or 'that rounded one'}"
    held = base.held
    embedding = "" if held.embedding == "keep" else f" --embedding {held.embedding}"
    head = "" if held.head in (None, held.embedding) else f" --head {held.head}"
    return f"four bits: its own model is BASE converted --to nf4{embedding}{head}"


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "merge", "Add an adapter to the weights of a base, in float32, and write a model folder in the base's dtype."
    )
    arguments.add_argument("base", type=Path, help="the base: a run, a checkpoint, a model folder, a .gguf or a .bin")
    arguments.add_argument("adapter", type=Path, help="the adapter: a run, a checkpoint or a folder in PEFT's format")
    arguments.add_argument("out", type=Path, help="the model folder to write")
    arguments.add_argument("--dtype", choices=_DTYPES, help="dtype of the merged weights (default: the base's)")
    arguments.add_argument("--refuse-if", type=float, metavar="X", help="write nothing if a logit moves by more than X")
    arguments.add_argument(
        "--probe", type=Path, metavar="FILE", help="text to compare logits on (default: random tokens)"
    )
    arguments.add_argument("--probe-tokens", type=int, default=256, help="tokens to compare on (default: 256)")
    arguments.add_argument("--other-base", action="store_true", help="merge although the adapter names another base")
    arguments.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments.add_argument("--threads", type=flags.thread_count, help="CPU threads")
    return arguments


def _lines(report: "MergeReport", out: Path) -> list[str]:
    return [
        f"merged into {out}",
        f"largest |Δlogit| against the unmerged model: {report.largest_difference:.3g} over {report.tokens} tokens",
        f"largest |Δlogit| the adapter makes:          {report.adapter_effect:.3g}",
        f"same next token:                             {100 * report.same_choice:.1f} %",
    ]

"""`entrenar convert SRC DST --to FORMAT`: write a model in another format, proved before it gets its name."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from entrenar import recipe
from entrenar.cli import flags
from entrenar.errors import ConfigError
from entrenar.interop.convert import Target, Threshold, check_target, convert, open_source
from entrenar.interop.proof.bounds import Format
from entrenar.peft import QuantizeConfig
from entrenar.peft.quantize import Kind
from entrenar.recipe.bit_budget import round_to_budget


def run(words: Sequence[str]) -> int:
    """Convert; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    thresholds = [Threshold.parse(text) for text in parsed.refuse_if]
    path = recipe.model_folder(parsed.source) if _is_run(parsed.source) else parsed.source
    _check_budget(parsed)
    source = open_source(path, parsed.tokenizer, is_streamed=parsed.to == "nf4" and parsed.bits is None)
    target = Target(
        parsed.target, parsed.to, parsed.dtype, parsed.overwrite, parsed.accept_tokenizer_differences,
        parsed.llama2c_version, QuantizeConfig(embedding=parsed.embedding or "keep", head=parsed.head),
    )  # fmt: skip
    if parsed.no_tokenizer:
        source = replace(source, tokenizer=None)
    lines: list[str] = []
    if parsed.bits is not None:
        check_target(source, target)
        source, budget = round_to_budget(source, parsed.bits, parsed.calibration, print)
        lines = budget.lines()
    report = convert(source, target, thresholds)
    print(f"{path} ({source.format}) -> {target.path} ({target.format} {target.dtype_for(source.model)})")
    print("\n".join([*lines, *report.lines()]))
    return 0


def _check_budget(parsed: argparse.Namespace) -> None:
    for flag in ("embedding", "head"):
        if getattr(parsed, flag) is not None and (parsed.to != "nf4" or parsed.bits is not None):
            raise ConfigError(
                f"--{flag} says how --to nf4 without --bits holds it; a budget chooses by itself, and the other "
                "formats have a dtype for all"
            )
    if parsed.bits is None:
        if parsed.calibration is not None:
            raise ConfigError("--calibration has no effect without --bits; give a budget, or leave it out")
    elif parsed.to != "nf4":
        raise ConfigError(
            f"--bits is a budget of nf4, got --to {parsed.to}; the other formats have widths of their own"
        )
    elif parsed.dtype is not None:
        raise ConfigError(
            "--dtype and --bits exclude each other: norms stay as they are stored, the rest has its budget"
        )


def _is_run(path: Path) -> bool:
    return path.is_dir() and not (path / "config.json").is_file() and not (path / "model.bin").is_file()


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "convert",
        "Write a model in another format. The written file is read back by an independent reader, which\n"
        "compares every weight, the logits on a probe set and the tokenizer on hard strings, before it gets its name.",
    )
    arguments.add_argument("source", type=Path, help="a run, a model folder, a .gguf or a .bin")
    arguments.add_argument("target", type=Path, help="a folder (hf, nf4, llama2c) or a file (gguf)")
    arguments.add_argument("--to", choices=get_args(Format), required=True, help="format to write")
    arguments.add_argument(
        "--dtype", help="f32, f16, bf16, q8_0 or q4_0 (default: the source's); nf4: of what is not quantized"
    )
    for part, otherwise in (("embedding", "keep"), ("head", "as the embedding")):
        arguments.add_argument(
            f"--{part}", choices=get_args(Kind), help=f"nf4: how the {part} is held (default: {otherwise})"
        )
    arguments.add_argument(
        "--bits",
        type=float,
        metavar="BITS",
        help="nf4: most bits a weight may take, all included (scales, embedding, head, norms); each matrix gets 2 to 8",
    )
    arguments.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="--bits: a text like those the model is for (default: what the model itself writes)",
    )
    tokenizers = arguments.add_mutually_exclusive_group()
    tokenizers.add_argument("--tokenizer", type=Path, help="tokenizer to take, instead of the source's")
    tokenizers.add_argument("--no-tokenizer", action="store_true", help="write the model alone")
    arguments.add_argument(
        "--refuse-if",
        nargs="+",
        default=[],
        metavar="METRIC>NUMBER",
        help="end with 1 and write nothing, like kl>0.01 or top1<0.9; metrics: kl, max_kl, dlogit, top1, tensor_error",
    )
    arguments.add_argument(
        "--accept-tokenizer-differences",
        action="store_true",
        help="write though the tokenizer in the file gives some strings other ids",
    )
    arguments.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    arguments.add_argument(
        "--llama2c-version", type=int, choices=(0, 1), default=0, help="layout of f32: 0 is what run.c reads (default)"
    )
    return arguments

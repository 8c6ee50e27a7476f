"""`entrenar merge BASE ADAPTER OUT`: put an adapter into a base's weights, and say what that cost."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from entrenar.cli import flags
from entrenar.data import Tokenizer
from entrenar.errors import ConfigError, DataError
from entrenar.files import atomic_directory
from entrenar.interop import save_model
from entrenar.interop.hf_peft import BaseIdentity, load_adapter, read_base
from entrenar.model import Llama
from entrenar.peft import DEFAULT_ADAPTER, MergeReport, checked_merge, quantized_projections, unload, widen
from entrenar.recipe import model_folder, open_model

_DTYPES = ("float32", "bfloat16", "float16")
_PROBE_SEED = 0


def run(words: Sequence[str]) -> int:
    """Merge; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    if parsed.out.resolve() in (parsed.base.resolve(), parsed.adapter.resolve()):
        raise ConfigError(f"OUT must be another folder than BASE and ADAPTER, got {parsed.out}")
    if parsed.out.exists() and not parsed.overwrite:
        raise ConfigError(f"{parsed.out} exists already; give --overwrite or another folder")
    model, tokenizer = open_model(parsed.base, dtype=getattr(torch, parsed.dtype) if parsed.dtype else None)
    adapter = model_folder(parsed.adapter)
    load_adapter(adapter, model, is_other_base_allowed=parsed.other_base)
    trained_over, is_quantized = read_base(adapter), next(quantized_projections(model), None) is not None
    probe = _probe(model, tokenizer, parsed.probe, parsed.probe_tokens)
    report = checked_merge(model, DEFAULT_ADAPTER, probe, refuse_above=parsed.refuse_if)
    unload(model)
    widen(model)
    with atomic_directory(parsed.out) as folder:
        save_model(folder, model.config, model.state_dict())
        tokenizer.save(folder)
    print("\n".join(_lines(report, parsed.out)))
    if trained_over is not None and trained_over.is_quantized and not is_quantized:
        print(f"the adapter was trained over this base in {_own_model(trained_over)};")
        print("one that began by LoftQ makes up for those bits, and belongs over them alone")
    return 0


def _own_model(base: BaseIdentity) -> str:
    if base.is_within_budget:
        return f"a budget of bits: its own model is {base.name or 'that rounded one'}"
    held = base.held
    embedding = "" if held.embedding == "keep" else f" --embedding {held.embedding}"
    head = "" if held.head in (None, held.embedding) else f" --head {held.head}"
    return f"four bits: its own model is BASE converted --to nf4{embedding}{head}"


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser(
        "merge", "Add an adapter to the weights of a base, in float32, and write a model folder of the base's dtype."
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
    arguments.add_argument("--threads", type=int, help="CPU threads")
    return arguments


def _probe(model: Llama, tokenizer: Tokenizer, path: Path | None, count: int) -> torch.Tensor:
    count = min(count, model.config.max_seq_len)
    if count < 1:
        raise ConfigError(f"--probe-tokens must be > 0, got {count}")
    if path is None:
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        return torch.randint(model.config.vocab_size, (1, count), generator=generator)
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))[:count]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--probe {path} cannot be read as text: {error}") from error
    if not ids:
        raise DataError(f"--probe {path} holds no token")
    return torch.tensor([ids])


def _lines(report: MergeReport, out: Path) -> list[str]:
    return [
        f"merged into {out}",
        f"largest |Δlogit| against the unmerged model: {report.largest_difference:.3g} over {report.tokens} tokens",
        f"largest |Δlogit| the adapter makes:          {report.adapter_effect:.3g}",
        f"same next token:                             {100 * report.same_choice:.1f} %",
    ]

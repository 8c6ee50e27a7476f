"""`entrenar plan --config FILE`: predict what a run takes and whether it fits, before anything is loaded."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from entrenar import planning, recipe
from entrenar.cli import flags
from entrenar.config import AnyConfig, FinetuneConfig, RunConfig
from entrenar.config_file import ConfigFile, load_config, load_finetune_config
from entrenar.errors import ConfigError, GateFailed
from entrenar.report.step_line import duration, quantity

if TYPE_CHECKING:
    from entrenar.planning import Advice, Change, MemoryLimit, RanksPlan, RunPlan
    from entrenar.scale import Link

_OF_FINETUNING = ("--model", "--method", "--data")


def run(words: Sequence[str]) -> int:
    """Print the plan; return 0 if the run fits, 1 if it does not."""
    kind = _kind(words)
    parsed = flags.parse(_arguments(kind), words)
    limit = planning.MemoryLimit(planning.parse_bytes(parsed.memory), "--memory") if parsed.memory else None
    read = partial(_read, kind, parsed.config, flags.given_flags(parsed, kind))
    config = read({})
    base = recipe.model_folder(config.model) if isinstance(config, FinetuneConfig) else None
    _check_ranks(config, parsed)
    if parsed.ranks > 1:
        return _plan_ranks(config, base, parsed, limit)
    planned = planning.plan_run(config, base)
    limit = limit or planning.memory_limit()
    fits = planned.step.peak_bytes <= limit.size_bytes
    if not parsed.json:
        print("\n".join(lines(planned, config)))
        print(f"memory       {_gb(limit.size_bytes)} ({limit.source}): {'it fits' if fits else 'it does NOT fit'}")
    advice = (
        None
        if fits
        else planning.advise(read, base, planned, limit.size_bytes, lambda change: _show(change, parsed.json))
    )
    if parsed.json:
        print(json.dumps(_as_json(planned, limit, advice), indent=2))
    if advice is None:
        return 0
    if not advice.fits:
        least = (advice.changes[-1].plan if advice.changes else planned).step.peak_bytes
        raise GateFailed(
            f"a peak of at most {_gb(limit.size_bytes)} is not possible: the least is {_gb(least)}"
            + (f", with {_words(advice.flags)}" if advice.changes else "")
            + "; choose a smaller model or a larger machine"
        )
    if not parsed.json:
        last = advice.changes[-1].plan
        print(f"it fits with {_words(advice.flags)}\n  peak {_gb(last.step.peak_bytes)}, {_step(last)} a step")
    return 1


def _check_ranks(config: AnyConfig, parsed: argparse.Namespace) -> None:
    """Refuse what the plan of several ranks would ignore.

    Raises: ConfigError.
    """
    if parsed.ranks == 1 and (parsed.link_rate or parsed.link_latency_us):
        raise ConfigError("--link-rate and --link-latency-us belong to --ranks; add it, or leave them out")
    if parsed.link_latency_us and not parsed.link_rate:
        raise ConfigError("--link-latency-us needs --link-rate; add it, or leave both out to measure them here")
    if parsed.ranks > 1 and config.scale.shard in ("full", "hybrid"):
        raise ConfigError(
            f"--ranks plans ranks with whole weights, got scale.shard = {config.scale.shard}; leave it out"
        )


def _plan_ranks(config: AnyConfig, base: Path | None, parsed: argparse.Namespace, limit: "MemoryLimit | None") -> int:
    """Print the plan of several ranks; return 0 if one of them fits, 1 if it does not."""
    share = planning.plan_run(config, base, ranks=parsed.ranks)
    limit = limit or planning.memory_limit()
    alone = planning.plan_run(config, base, share.step.imports_bytes)
    planned = planning.RanksPlan(parsed.ranks, share, alone, _link(parsed))
    fits = share.step.peak_bytes <= limit.size_bytes
    if parsed.json:
        print(json.dumps(_ranks_as_json(planned, limit), indent=2))
    else:
        print("\n".join([*lines(share, config), *_ranks_lines(planned, is_given=parsed.link_rate is not None)]))
        print(f"memory       {_gb(limit.size_bytes)} ({limit.source}): one rank {'fits' if fits else 'does NOT fit'}")
        if not fits:
            print(f"for advice plan one rank: --batch-size {planning.batches_of(config).batch_size // parsed.ranks}")
    return 0 if fits else 1


def _link(parsed: argparse.Namespace) -> "Link":
    from entrenar.scale import Link, measure_loopback  # noqa: PLC0415  # loads torch

    if parsed.link_rate is None:
        return measure_loopback()  # by two processes
    rate = planning.parse_bytes(parsed.link_rate.removesuffix("/s"), "--link-rate")
    return Link(float(rate), 1e-6 * (parsed.link_latency_us or 0))


def _ranks_lines(planned: "RanksPlan", *, is_given: bool) -> list[str]:
    link = planned.link
    source = "given" if is_given else "measured between two processes of this machine"
    return [
        f"ranks        {planned.ranks} with whole weights; the figures above are one rank's",
        f"link         {_gb(round(link.bytes_per_s))}/s, {1e6 * link.latency_s:,.0f} µs a sum ({source})",
        f"sums         {planned.share.step.trained_tensors} a step, {_gb(planned.sent_bytes)} sent by each rank,"
        f" about {planned.sum_s:.2g}s",
        f"all ranks    about {planned.step_s:.2g}s a step, where one process takes {planned.alone_s:.2g}s: efficiency"
        f" {planned.efficiency:.0%}",
        "             if each rank has a processor as fast as this one to itself",
    ]


def _ranks_as_json(planned: "RanksPlan", limit: "MemoryLimit") -> dict[str, Any]:
    return {
        "ranks": planned.ranks, "limit_bytes": limit.size_bytes, "limit": limit.source,
        "fits": planned.share.step.peak_bytes <= limit.size_bytes, "of_one_rank": _figures(planned.share),
        "alone": _figures(planned.alone), "link_bytes_per_s": planned.link.bytes_per_s,
        "link_latency_s": planned.link.latency_s, "sums": planned.share.step.trained_tensors,
        "sent_bytes": planned.sent_bytes, "sum_s": planned.sum_s, "step_s": planned.step_s,
        "efficiency": planned.efficiency,
    }  # fmt: skip


def measured(planned: "RunPlan | None") -> str:
    """Return the line after a run with the peak that the kernel measured, and the planned one if there is a plan."""
    peak = planning.status_bytes("VmHWM")
    if planned is None:
        return f"  memory            peak {_gb(peak)}"
    plan = planned.step.peak_bytes
    return f"  memory            planned peak {_gb(plan)}, measured {_gb(peak)} ({plan / peak - 1:+.1%})"


def lines(planned: "RunPlan", config: AnyConfig) -> list[str]:
    """Return a plan as text."""
    step = planned.step
    share = 1 - step.trained_parameters / planned.parameters
    trained = f"{step.trained_parameters:,} trained ({share:.2%} fewer)" if share > 0 else "all trained"
    rows = [
        f"run          {config.run_dir}",
        f"parameters   {planned.parameters:,}, {trained}",
        f"peak         {_gb(step.peak_bytes)}, {_gb(step.added_bytes)} over imports",
        f"  {'imports':<14}{_gb(step.imports_bytes):>10}",
        f"  {'kernels':<14}{_gb(step.kernels_bytes):>10}",
        *(f"  {kind:<14}{_gb(size):>10}" for kind, size in sorted(step.tensors.items(), key=lambda item: -item[1])),
    ]
    if step.allocator_bytes is not None:
        rows.append(f"  {'allocator':<14}{_gb(step.allocator_bytes):>10}")
    rate = planned.tokens / step.step_s
    spent = f"{planned.needed_flops:.3g} needed, {step.flops:.3g} spent"
    rows += [
        f"step         {planned.tokens:,} tokens, {spent} FLOPs, about {_step(planned)}"
        f" ({quantity(rate) if rate >= 10 else format(rate, '.2g')} tokens/s)",
        f"disk         {_gb(planned.disk_bytes)} at most: {planned.kept_checkpoints} checkpoints of "
        f"{_gb(step.checkpoint_bytes)}" + (f", {_gb(planned.cache_bytes)} of caches" if planned.cache_bytes else ""),
    ]
    return rows


def _arguments(kind: type[BaseModel]) -> argparse.ArgumentParser:
    arguments = flags.parser(
        "plan",
        "Predict what a run takes: memory by use, arithmetic, disk, time; and what to change if it does not fit.\n\n"
        "  entrenar plan --preset 124m --batch-size 8\n"
        "  entrenar plan --model DIR --data rows.jsonl --method lora --memory 6GB",
    )
    arguments.add_argument("--memory", metavar="SIZE", help="plan for a machine with this much memory, such as 6GB")
    arguments.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments.add_argument("--ranks", type=flags.positive, default=1, metavar="N", help="plan for N processes")
    arguments.add_argument("--link-rate", metavar="SIZE", help="what a rank sends in a second; measured here if absent")
    arguments.add_argument(
        "--link-latency-us", type=flags.positive, metavar="N", help="what the least sum takes, in µs"
    )
    flags.add_config_flags(arguments, kind)
    return arguments


def _kind(words: Sequence[str]) -> type[RunConfig] | type[FinetuneConfig]:
    """Return the kind of run to plan, pre-training or fine-tuning: by its flags, or else by its config file."""
    if any(word.partition("=")[0] in _OF_FINETUNING for word in words):
        return FinetuneConfig
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    file = ConfigFile.read(early.parse_known_args(list(words))[0].config)
    return FinetuneConfig if file.is_of_finetuning else RunConfig


def _read(kind: type[BaseModel], file: Path | None, given: Mapping[str, str], changed: Mapping[str, str]) -> AnyConfig:
    if kind is FinetuneConfig:
        return load_finetune_config(file, {**given, **changed})
    config = load_config(file, {**given, **changed})
    return planning.sized_for_corpus(config)


def _show(change: "Change", is_json: bool) -> None:  # noqa: FBT001 - a callback's last word
    if not is_json:
        print(f"  {_words(change.flags):<44} peak {_gb(change.plan.step.peak_bytes)}, {_step(change.plan)} a step")
        sys.stdout.flush()


def _words(changed: Mapping[str, str]) -> str:
    return " ".join(f"--{key.rpartition('.')[2].replace('_', '-')} {value}" for key, value in changed.items())


def _step(planned: "RunPlan") -> str:
    seconds = planned.step.step_s
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.0f} MB"


def _as_json(planned: "RunPlan", limit: "MemoryLimit", advice: "Advice | None") -> dict[str, Any]:
    fits = planned.step.peak_bytes <= limit.size_bytes
    result = {"limit_bytes": limit.size_bytes, "limit": limit.source, "fits": fits, **_figures(planned)}
    if advice is not None:
        changes = [{"flags": dict(change.flags), **_figures(change.plan)} for change in advice.changes]
        result["advice"] = {"fits": advice.fits, "flags": advice.flags, "changes": changes}
    return result


def _figures(planned: "RunPlan") -> dict[str, Any]:
    step = planned.step
    return {
        "parameters": planned.parameters, "trained_parameters": step.trained_parameters,
        "peak_bytes": step.peak_bytes, "added_bytes": step.added_bytes, "imports_bytes": step.imports_bytes,
        "kernels_bytes": step.kernels_bytes, "tensors_bytes": dict(step.tensors),
        "allocator_bytes": step.allocator_bytes, "needed_flops": planned.needed_flops, "spent_flops": step.flops,
        "tokens": planned.tokens, "step_s": step.step_s, "checkpoint_bytes": step.checkpoint_bytes,
        "disk_bytes": planned.disk_bytes,
    }  # fmt: skip

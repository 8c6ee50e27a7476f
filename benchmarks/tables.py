"""Write the measured tables into README and book from the raw JSON: `python benchmarks/tables.py [--check]`.

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`; nothing between them is written by hand.
"""

import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import debt_tables
import memory_tables
import option_tables
import quality_tables
from figures import RESULTS, result, rows
from headline import lines as headline_lines

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "examples").glob("**/*.md"))]
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def headline() -> str:
    """What README shows first."""
    return rows(["", "", "more"], list(headline_lines(result)))


def train_step() -> str:
    """Ours against transformers, a step of the 124m preset."""
    lines = []
    for precision in ("bfloat16", "float32"):
        figures = result(f"train_step_{precision}")
        if figures is None:
            lines.append([precision, *["not measured"] * 5])
            continue
        speed, peak = figures["tokens_per_s"], figures["peak_bytes"]
        share = figures["share_of_peak"]["ours"]
        lines.append(
            [
                precision,
                f"{speed['ours']:.0f}",
                f"{speed['transformers']:.0f}",
                f"**{figures['speed_over_transformers']:.2f} ×**",
                ", ".join(f"{value:.2f} of {dtype}" for dtype, value in sorted(share.items())),
                f"{peak['ours'] / 1e9:.2f} GB against {peak['transformers'] / 1e9:.2f}: "
                f"**{figures['peak_over_transformers']:.2f} ×** (added to imports: "
                f"{figures['added_peak_over_transformers']:.2f} ×)",
            ]
        )
    figures = result("train_step_bfloat16") or result("train_step_float32") or {}
    note = f"\n{figures.get('cpu', '')}; torch {figures.get('torch', '')}; {figures.get('date', '')}; "
    header = ["precision", "ours, tokens/s", "transformers", "speed", "share of product peak", "peak memory"]
    return rows(header, lines) + note + "`python benchmarks/train_step.py --precision …`\n"


def decode_quantized() -> str:
    """A token's time from NF4: as it is, and prepared."""
    figures = result("decode_quantized")
    if figures is None:
        return "not measured\n"
    lines = [
        [
            str(case["rows"]),
            f"{case['token_ms']['exact']:,.0f}",
            f"{case['token_ms']['auto']:,.0f}",
            f"**{case['speedup']:.1f} ×**",
            f"{case['share_of_bandwidth']:.2f}",
            f"{case['prepare_s']:.1f}",
        ]
        for case in figures["cases"]
    ]
    header = ["rows", "exact, ms a token", "auto", "speed", "share of the bound", "to prepare, s"]
    note = (
        f"\n{figures['parameters']:,} parameters in NF4, {figures['threads']} threads, memory read at "
        f"{figures['read_gb_per_s']:.1f} GB/s; torch {figures['torch']}; {figures['date']}; "
        "`python benchmarks/decode_quantized.py`\n"
    )
    return rows(header, lines) + note


def alarms() -> str:
    """Faults that came in with the data, with a rewind and without."""
    figures = result("alarms")
    if figures is None:
        return "not measured\n"
    lines = []
    for fault in dict.fromkeys(row["fault"] for row in figures["rows"] if row["fault"]):
        of_fault = [row for row in figures["rows"] if row["fault"] == fault]
        cells = [
            fault.replace("_", " ").replace("nan", "NaN"),
            "yes" if all(r["seen_before_the_update"] for r in of_fault) else "no",
        ]
        for policy in ("none", "rewind"):
            moved = sorted(row["relative_to_clean"] for row in of_fault if row["policy"] == policy)
            cells.append(f"{statistics.median(moved):+.1%} ({moved[-1]:+.1%})")
        lines.append(cells)
    header = ["fault", "seen before the update", "held-out loss without a policy", "with a rewind"]
    note = f"\nAgainst the run without a fault, median of three seeds and (worst); {figures['steps']} steps; "
    return rows(header, lines) + note + "`python benchmarks/alarms.py`\n"


def chaos() -> str:
    """Training under less and less memory."""
    figures = result("chaos")
    if figures is None:
        return "not measured\n"
    endings: dict[str, list[float]] = {}
    for row in figures["levels"]:
        same = row["ending"] == "survived" and row["largest_difference"] == 0
        what = "the weights of the undisturbed run" + ("" if same else " to 1e-5")
        ending = what if row["ending"] == "survived" else f"exit code {row['exit_code']} and a sentence"
        endings.setdefault(ending if row["is_good"] else f"{row['ending']}, which it must not", []).append(
            row["added_mb"]
        )
    lines = [[f"{max(some):,.0f} to {min(some):,.0f} MB", str(len(some)), ending] for ending, some in endings.items()]
    return rows(["memory added after start-up", "levels", "end"], lines) + "\n`python benchmarks/chaos.py`\n"


def kills() -> str:
    """Runs killed at random moments."""
    figures = result("kills")
    if figures is None:
        return "not measured\n"
    names = {
        "saves": "float32, killed during a save",
        "resumes": "float32, killed while it resumes",
        "qlora": "QLoRA with trunk cache",
        "lora": "LoRA",
    }
    lines = [
        [
            names.get(way, f"pre-training, {way}"), f"{row['kills']}", f"{row['runs']}", f"{row['kills_while_saving']}",
            f"{row['runs_that_failed']}", f"{row['runs_with_other_bytes']}",
        ]
        for way, row in figures["ways"].items()
    ]  # fmt: skip
    header = ["way", "kills", "runs completed", "kills with a save half written", "lost", "other bytes at the end"]
    return rows(header, lines) + "\n`python benchmarks/kills.py --kills 200`\n"


def ops() -> str:
    """Every op against torch's alternatives, forward and backward."""
    report = result("ops")
    if report is None:
        return "not measured\n"
    lines = [
        [r["op"], r["dtype"], r["alternative"], f"{r['median_ms']:.1f}", f"{r['peak_mib']:.1f}"]
        for r in report["results"]
        if r["phase"] != "forward"
    ]
    load = report["load_average_before_and_after"]
    note = f"\n{report['processor']}, {report['threads']} threads; torch {report['torch']}; {report['date']}; "
    note += f"load average {load[0]} before, {load[1]} after; `python benchmarks/ops.py`\n"
    return rows(["op", "stored in", "path", "forward + backward, ms", "peak, MiB"], lines) + note


def finetune() -> str:
    """LoRA against peft, and the gains of cache, packing and answers only."""
    parts = {part: result(f"finetune_{part}") for part in ("peft", "step", "trunk", "layout")}
    places = {
        "LoRA here against peft and transformers, tokens/s": ("peft", "speed_over_peft"),
        "the same, added memory": ("peft", "added_peak_over_peft"),
        "the same, held-out loss": ("peft", "held_out_over_peft"),
        "a step of LoRA on all layers against full, equal tokens": ("step", "step_gain_at_equal_tokens"),
        "an epoch over the filled trunk cache against full": ("trunk", "filled_epoch_gain"),
        "time to full's best held-out loss, cache filled in the run": ("trunk", "time_to_quality_gain", "cached"),
        "the same, cache filled by an earlier run": ("trunk", "time_to_quality_gain", "cached, filled before"),
        "full itself, until within 1 % of its best": ("trunk", "time_to_quality_gain", "full"),
        "packing against one example a row, tokens/s": ("layout", "packing_gain"),
        "targets on answers only against all tokens, tokens/s": ("layout", "answers_only_gain"),
    }
    lines = []
    for name, (part, *keys) in places.items():
        found = parts[part]
        for key in keys:
            found = None if found is None else found.get(key)
        if found is None:
            lines.append([name, "not measured" if parts[part] is None else "not reached"])
        else:
            lines.append([name, f"{found} ×"])
    notes = [f"- {part}: {setting(figures)}\n" for part, figures in parts.items() if figures is not None]
    return rows(["", "gain"], lines) + "\n" + "".join(notes)


def setting(measured: dict[str, Any]) -> str:
    """Say on what and when a part of fine-tuning was measured."""
    work = measured["workload"]
    words = [f"{work['examples']} rows", f"{work['rounds']} epochs", f"rank {work['rank']}"]
    if work["part"] == "trunk":
        words += [f"top:{work['top']} of {work['targets']}", f"learning rate {work['lr']}", f"full's {work['full_lr']}"]
    words += [f"{work.get('clock', 'wall')} time of {work['threads']} threads", measured["cpu"].split(",")[0]]
    return ", ".join([*words, measured["date"]])


def tasks() -> str:
    """Scores of three tasks before and after, and with shuffled answers."""
    measured = result("tasks_quality")
    if measured is None:
        return "not measured\n"

    def with_interval(found: list[float]) -> str:
        return f"{100 * found[0]:.1f} ({100 * found[1]:.1f} … {100 * found[2]:.1f})"

    lines = [
        [
            f"{name}, {task['plan']['metric'].replace('_', ' ')}, {task['questions']} questions",
            *(f"{100 * task['score'][model][0]:.1f}" for model in ("base", "tuned", "shuffled")),
            f"**{with_interval(task['tuned_minus_base'])}**",
            with_interval(task["shuffled_minus_base"]),
            with_interval(task["tuned_minus_shuffled"]),
        ]
        for name, task in measured.items()
        if isinstance(task, dict)
    ]
    header = ["%", "base", "tuned", "shuffled", "tuned - base", "shuffled - base", "tuned - shuffled"]
    tasks = [task for task in measured.values() if isinstance(task, dict)]
    dates = ", ".join(sorted({task.get("header", measured)["date"] for task in tasks}))
    return rows(header, lines) + f"\nBase: {measured['base']}. 95 % bootstrap intervals. {dates}\n"


def falls() -> str:
    """The held-out loss at every evaluation, for three seeds."""
    measured = result("tasks_falls")
    if measured is None:
        return "not measured\n"
    losses = measured["held_out_loss"]
    steps = [min(at * measured["eval_every"], measured["steps"]) for at in range(len(losses["0"]))]
    lines = [
        [seed, *(f"{loss:.4f}" for loss in values), "yes" if measured["falls_at_every_evaluation"][seed] else "**no**"]
        for seed, values in losses.items()
    ]
    return rows(["seed", *(f"step {step}" for step in steps), "falls each time"], lines)


def qlora() -> str:
    """QLoRA against peft over bitsandbytes, a step of the 124m preset, and its held-out loss against LoRA's."""
    measured, quality = result("qlora_step"), result("qlora_quality")
    if measured is None:
        return "not measured\n"
    names = {
        "qlora": "QLoRA here",
        "lora": "LoRA here, bfloat16 base",
        "peft_bfloat16": "peft + bitsandbytes, products in bfloat16",
        "peft_float32": "peft + bitsandbytes, products in float32",
    }
    speed, added = measured["tokens_per_s"], measured["added_peak_bytes"]
    lines = [
        [
            label,
            f"{speed[name]:.0f}",
            f"{speed['qlora'] / speed[name]:.2f} ×",
            f"{added[name] / 1e9:.2f} GB",
            f"{added['qlora'] / added[name]:.2f} ×",
        ]
        for name, label in names.items()
    ]
    header = ["", "tokens/s", "QLoRA here against it", "added peak memory", "QLoRA here against it"]
    work = measured["workload"]
    note = f"\n{work['clock']} time, threads: {work['threads']}; {measured['cpu'].split(',')[0]}; {measured['date']}\n"
    if quality is not None:
        steps = quality["workload"]["steps"] * quality["workload"]["rounds"]
        before, after = quality["held_out_before"], {name: some[-1] for name, some in quality["held_out_loss"].items()}
        note += (
            f"\nHeld-out loss of {quality['workload']['model']} after {steps} steps on the same alpaca rows: LoRA "
            f"{before['lora']:.4f} → {after['lora']:.4f}, QLoRA {before['qlora']:.4f} → {after['qlora']:.4f}, "
            f"**{quality['qlora_over_lora']:.4f} ×**.\n"
        )
    return rows(header, lines) + note


def test_data() -> str:
    """What drawing a tensor whole gains over drawing it number by number."""
    measured = result("test_data")
    if measured is None:
        return "not measured\n"

    def gain(found: list[float] | None) -> str:
        return "refused by hypothesis" if found is None else f"**{found[0]} ×** ({found[1]} … {found[2]})"

    lines = [
        [shape, str(figures["ms"]["whole"]), gain(figures["gain"].get("arrays")),
         gain(figures["gain"].get("element by element"))]
        for shape, figures in measured["shapes"].items()
    ]  # fmt: skip
    note = f"\nProcessor time, medians of {measured['rounds']} turns with 95 % bootstrap intervals; {measured['cpu']}; "
    header = ["shape", "whole, ms", "gain over hypothesis' arrays", "gain over each number drawn"]
    return rows(header, lines) + note + f"{measured['date']}; `python benchmarks/test_data.py`\n"


def of_quality(name: str) -> str:
    """What the gates measured, from quality/results."""
    path = ROOT / "quality" / "results" / f"{name}.json"
    if not path.is_file():
        return "not measured\n"
    header, lines, note = quality_tables.TABLES[name](json.loads(path.read_text(encoding="utf-8")))
    return rows(header, lines) + note


def of_debt(table: Callable[[dict[str, Any]], debt_tables.Table], place: Path) -> str:
    """What the technical-debt score gives, and how it was measured itself."""
    if not place.is_file():
        return "not measured\n"
    header, lines, note = table(json.loads(place.read_text(encoding="utf-8")))
    return rows(header, lines) + note


def tiers() -> str:
    measured = result("tiers")
    if measured is None:
        return "not measured\n"
    figures = [f"{point}_{figure}" for figure in ("wall_s", "cpu_s") for point in ("median", "p95")]
    lines = []
    for tier, kinds in measured["tiers"].items():
        for kind, run in kinds.items():
            loads = [each["load"] for each in run["runs"]]
            seconds = [f"{run[figure]:.2f} s" for figure in figures]
            lines.append([f"`make {tier}`, {kind}", *seconds, f"{min(loads):g} to {max(loads):g}"])
    header = ["", "wall, median", "wall, p95", "CPU, median", "CPU, p95", "load of the machine"]
    return rows(header, lines) + f"\n{measured['cpu']}, {measured['date']}; ten runs each.\n"


def decode() -> str:
    """Greedy decoding against transformers, and what a token costs as the context grows."""
    measured = result("decode")
    if measured is None:
        return "not measured\n"
    lines = [
        [
            name,
            *(f"{case['tokens_per_s'][who]:,}" for who in ("ours", "transformers")),
            f"**{case['speed_over_transformers']:.2f} ×**",
            f"{case['cpu_speed_over_transformers']:.2f} ×",
            "yes" if case["same_tokens"] else "**no**",
        ]
        for name, case in measured["cases"].items()
    ]
    growth = [
        [f"{int(context):,}", f"{cost['ours']:,.0f}", f"{cost['transformers']:,.0f}"]
        for context, cost in measured["cpu_us_per_token"].items()
    ]
    table = rows(["model", "ours, tokens/s", "transformers", "speed", "by processor time", "same tokens"], lines)
    table += "\nProcessor time of a token by the tokens before it, tiny preset with a longer context:\n\n"
    table += rows(["tokens before", "ours, µs", "transformers, µs"], growth)
    note = (
        f"{measured['new_tokens']} new tokens after {measured['prompt']}; {measured['cpu']}; torch {measured['torch']}"
    )
    return f"{table}\n{note}; {measured['date']}; `python benchmarks/decode.py`\n"


TABLES: dict[str, Callable[[], str]] = {
    "decode_quantized": decode_quantized, "alarms": alarms, "kills": kills, "chaos": chaos,
    "headline": headline, "train_step": train_step, "ops": ops, "finetune": finetune, "tasks": tasks, "falls": falls,
    "bit_budget": memory_tables.bit_budget, "qlora": qlora,
    "memory": memory_tables.memory, "methods": memory_tables.methods, "test_data": test_data, "tiers": tiers,
    **{name: functools.partial(of_quality, name) for name in quality_tables.TABLES},
    "debt": functools.partial(of_debt, debt_tables.repository, ROOT / ".pmat" / "tdg-baseline.json"),
    "debt_fixes": functools.partial(of_debt, debt_tables.fixes, RESULTS / "debt.json"),
    "debt_tools": functools.partial(of_debt, debt_tables.tools, RESULTS / "debt.json"),
    "debt_time": functools.partial(of_debt, debt_tables.seconds, RESULTS / "debt.json"),
    "options_of_runs": option_tables.options_of_runs, "options_of_finetuning": option_tables.options_of_finetuning,
    "decode": decode, "load": memory_tables.load, "plan": memory_tables.plan,
}  # fmt: skip


def filled(text: str) -> str:
    """Return a page with its tables written anew."""
    return _BLOCK.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[3], text)


def main() -> int:
    """Write the tables, or with --check say which pages are stale."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        if "--check" in sys.argv:
            print(f"{page.relative_to(ROOT)} is stale: run python benchmarks/tables.py")
        else:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

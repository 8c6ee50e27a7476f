"""Tables of what runs, budgets and loading take in memory, from the raw figures."""

from typing import Any

from figures import result, rows


def memory() -> str:
    """What training takes: method, precision and size, then the levers."""
    report = result("memory")
    if report is None:
        return "not measured\n"
    lines = []
    for name, cell in report["cells"].items():
        if "added_peak_bytes" not in cell:
            least = cell.get("needs_at_least_bytes")
            fate = "failed" if least is None else f"does not fit: weights and state alone {least / 1e9:.1f}"
            lines.append([name, "", fate, "", "", ""])
            continue
        figures = [cell[kind] / 1e6 for kind in ("base_bytes", "added_peak_bytes")]
        parts = [cell[f"most_added_{kind}_bytes"] / 1e6 for kind in ("anonymous", "file")]
        speed = f"{cell['tokens_per_s']:.0f} (load {cell['load_average']})"
        lines.append([name, f"{figures[0]:,.0f}", f"**{figures[1]:,.0f}**", *(f"{part:,.0f}" for part in parts), speed])
    header = ["cell", "weights, MB", "added peak, MB", "anonymous", "of files", "tokens/s"]
    note = f"\n{report['cpu']}; torch {report['torch']}; {report['date']}; `python benchmarks/memory.py`\n"
    return rows(header, lines) + note + _reduction(report["cells"])


def methods() -> str:
    """What each method takes, by the size of the model: added memory and speed of a step."""
    report = result("memory") or {"cells": {}}
    lines = []
    for preset in ("124m", "1b", "7b"):
        for method in ("full", "lora", "qlora", "qlora-streamed"):
            for precision in ("float32", "bfloat16"):
                cell = report["cells"].get(f"matrix {preset} {method} {precision}", {})
                if peak := cell.get("added_peak_bytes"):
                    speed = f"{cell['tokens_per_s']:.1f} (load {cell['load_average']})"
                    lines.append([preset, method, precision, f"**{peak / 1e9:.2f}**", speed])
    header = ["model", "method", "precision", "added memory, GB", "tokens/s"]
    note = f"\n{report.get('cpu')}; torch {report.get('torch')}; {report.get('date')}; `python benchmarks/memory.py`\n"
    return rows(header, lines) + note


def _reduction(cells: dict[str, Any]) -> str:
    """Say how far each QLoRA lies below LoRA in float32, by the peaks that were added."""
    said = []
    for preset in ("124m", "1b", "7b"):
        lora = cells.get(f"matrix {preset} lora float32", {})
        whole = lora.get("added_peak_bytes", lora.get("needs_at_least_bytes"))
        bound = "" if "added_peak_bytes" in lora else " (of its weights alone)"
        for name, cell in cells.items():
            method = name.removeprefix(f"matrix {preset} ").removesuffix(" bfloat16")
            part = cell.get("added_peak_bytes")
            if whole and part and cell["cell"]["method"] == "qlora" and name == f"matrix {preset} {method} bfloat16":
                said.append(f"{preset} {method} {1 - part / whole:.1%}{bound}")
    return "\nBelow LoRA in float32: " + "; ".join(said) + ".\n" if said else ""


def bit_budget() -> str:
    """A base in bfloat16, in NF4 and at a budget of bits, before and after the same LoRA steps."""
    report = result("bit_budget") or {}
    lines = [
        [
            f"{name}, {figures['weights']:,} weights" if variant == "bfloat16" else "",
            variant.replace("nf4", "NF4").replace("budget", f"budget of {figures['bits']:g}"),
            f"{found['bits_per_weight']:.2f}",
            f"{figures['below_bfloat16'][variant]:.1%}",
            f"{found['loss_before']:.4f}",
            f"{found['loss_after']:.4f}",
            f"{figures['loss_over_lora'][variant]:.4f}",
        ]
        for name, figures in sorted(report.items(), key=lambda item: -item[1]["weights"])
        for variant in ("bfloat16", "nf4", "nf4, LoftQ", "budget", "budget, LoftQ")
        for found in [figures["variants"].get(variant)]
        if found is not None
    ]
    header = ["model", "base", "bits a weight", "below", "held-out loss", "after the steps", "/ LoRA"]
    notes = [
        f"{name}: {figures['steps']} steps of {figures['tokens_a_step']:,} tokens of {figures['text']}, "
        f"{figures['held_out_targets']:,} held-out targets"
        + (f", {figures['loftq_turns']} turns of LoftQ" if figures.get("loftq_turns") else "")
        for name, figures in sorted(report.items(), key=lambda item: -item[1]["weights"])
    ]
    return rows(header, lines) + "\n" + "; ".join(notes) + "; `python benchmarks/bit_budget.py`\n"


def load() -> str:
    """Time and memory to load a folder of the 1b preset."""
    measured = result("load_bfloat16")
    if measured is None:
        return "not measured\n"
    lines = [
        [
            name,
            f"{measured['elapsed_s'][who]:.2f}",
            f"{measured['cpu_s'][who]:.2f}",
            f"{measured['added_peak_over_model'][who]:.3f} × the model",
        ]
        for who, name in (("ours", "ours, which looks at every weight for NaN"), ("transformers", "transformers"))
    ]
    note = f"\n{measured['workload']}; {measured['cpu']}; {measured['date']}; `python benchmarks/load.py`\n"
    return rows(["", "s", "processor s", "added peak memory"], lines) + note


def plan() -> str:
    """Planned and measured peaks; where freed memory is kept the median of several, and the range of both."""
    cells = (result("plan") or {"cells": {}})["cells"]
    lines = [
        [
            name,
            _megabytes(cell["planned_bytes"], cell.get("all_planned_bytes")),
            _megabytes(cell["measured_bytes"], cell.get("all_measured_bytes")),
            f"{cell['ratio']:.3f}" if abs(cell["ratio"] - 1) <= 0.05 else f"**{cell['ratio']:.3f}**",
        ]
        for name, cell in sorted(cells.items())
    ]
    return rows(["cell", "planned, MB over imports", "measured", "ratio (bold: off by more than 5 %)"], lines)


def _megabytes(size_bytes: int, all_bytes: list[int] | None) -> str:
    spread = f" ({all_bytes[0] / 1e6:.0f} to {all_bytes[-1] / 1e6:.0f})" if all_bytes else ""
    return f"{size_bytes / 1e6:,.0f}{spread}"

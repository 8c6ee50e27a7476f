"""The figures that README shows first, each from its raw JSON; `tables.py` writes them."""

from collections.abc import Callable, Iterator
from typing import Any

Result = Callable[[str], Any]


def lines(result: Result) -> Iterator[list[str]]:
    """Yield what is compared, its figure and the page that says more; what was not measured is left out."""
    steps = [step for precision in ("float32", "bfloat16") if (step := result(f"train_step_{precision}"))]
    if steps:
        ours, theirs = (max(steps, key=lambda step: step["tokens_per_s"][side]) for side in ("ours", "transformers"))
        speed = ours["tokens_per_s"]["ours"] / theirs["tokens_per_s"]["transformers"]
        memory = ours["peak_bytes"]["ours"] / theirs["peak_bytes"]["transformers"]
        yield [
            "A training step against transformers, 124m, the fastest precision of each",
            f"**{speed:.2f} ×** the tokens/s, {memory:.2f} × the memory",
            "below",
        ]
    if peft := result("finetune_peft"):
        yield [
            "LoRA against peft and transformers, 124m",
            f"**{peft['speed_over_peft']:.2f} ×** the tokens/s, {peft['added_peak_over_peft']:.2f} × the added memory, "
            f"{peft['held_out_over_peft']:.5f} × the held-out loss",
            "[fine-tune](docs/finetune.md)",
        ]
    if trunk := result("finetune_trunk"):
        yield [
            "An epoch of LoRA over cached frozen layers against full fine-tuning, 124m",
            f"**{trunk['filled_epoch_gain']:.1f} ×**",
            "[fine-tune](docs/finetune.md)",
        ]
    yield from _memory((result("memory") or {}).get("cells", {}))
    if bits := result("bit_budget"):
        name, largest = max(bits.items(), key=lambda item: item[1]["weights"])
        yield [
            f"The whole base in {largest['bits']:g} bits per weight ({name})",
            f"**{largest['below_bfloat16']['budget']:.1%}** below bfloat16, "
            f"{largest['loss_over_lora']['budget']:.4f} × LoRA's held-out loss",
            "[a bit budget](docs/bit_budget.md)",
        ]
    if decode := result("decode"):
        gains = [case["speed_over_transformers"] for case in decode["cases"].values()]
        yield [
            "Greedy decoding of small models against transformers",
            f"**{min(gains):.1f} to {max(gains):.1f} ×** the tokens/s",
            "[formats](docs/formats.md)",
        ]


def _memory(cells: dict[str, Any]) -> Iterator[list[str]]:
    mapped, streamed = (
        cells.get(f"matrix 7b {kind} bfloat16", {}).get("added_peak_bytes") for kind in ("qlora", "qlora-streamed")
    )
    if mapped and streamed:
        yield [
            "A QLoRA step of a 7B, 1 × 512 tokens",
            f"**{mapped / 1e9:.1f} GB** of added memory, {streamed / 1e9:.1f} with the base streamed from its folder",
            "[memory](docs/memory.md)",
        ]

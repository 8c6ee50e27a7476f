"""Draw the loss curve of a run and keep its metrics: `python benchmarks/plot_run.py RUN docs/NAME`.

Writes docs/NAME-loss.png and docs/NAME-metrics.jsonl (step, loss, learning rate, held-out figures, seconds).
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def main(run: Path, target: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [(record["step"], record["held_out"]["loss"]) for record in records if record["held_out"]]
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes.plot(
        [r["step"] for r in records], [r["loss"] for r in records], color="#9db4d0", linewidth=1, label="training"
    )
    axes.plot(*zip(*held_out, strict=True), color="#b03a2e", marker="o", markersize=4, linewidth=1.5, label="held-out")
    for step, loss in (held_out[0], held_out[-1]):
        axes.annotate(
            f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(4, 7), color="#b03a2e", fontsize=9
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", title=f"{run.name}: {records[-1]['targets']:,} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(f"{target}-loss.png")
    Path(f"{target}-metrics.jsonl").write_text("".join(json.dumps(kept(r)) + "\n" for r in records), encoding="utf-8")


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the book keeps."""
    short = {"step": record["step"], "loss": round(record["loss"], 4), "lr": record["lr"]}
    short |= {"elapsed_s": round(record["elapsed_s"], 1), "targets": record["targets"]}
    if record["held_out"]:
        short["held_out"] = {name: round(value, 4) for name, value in record["held_out"].items()}
    return short


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""A model of a step on many ranks: first it must reproduce what was measured here, then it extrapolates to GPUs.

    python benchmarks/scale_model.py        # writes benchmarks/results/scale_model.json

Here: step = arithmetic of a rank's share at the rate of the plain run + sums of all gradients over the measured link,
nothing overlapped, and ranks beyond the number of cores share them. Nothing is fitted to the runs of several ranks.

On GPUs the weights are fully sharded (Rajbhandari et al. 2020): every matrix is gathered for forward and again for
backward, and its gradient is reduced and scattered, so each rank sends and receives 3 (N-1)/N of the weights' bytes a
step. What hides behind the arithmetic of other blocks is not paid. Every assumption is a named number below; none was
measured by this project.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from figures import result
from turns import write_result

from entrenar.model import LlamaConfig
from entrenar.scale import Link

MOST_OFF = 0.2  # a model that is further off than this from what was measured extrapolates nothing


@dataclass(frozen=True)
class Assumptions:
    """A cluster of GPUs, from vendors' data sheets and published practice; not measured here."""

    peak_flops_per_s: float = 989e12  # H100 SXM, dense bfloat16, data sheet
    utilization: float = 0.40  # of the peak in matrix products, usual for models of this size
    gpus_per_host: int = 8
    inside_bytes_per_s: float = 360e9  # NVLink 4: 450 GB/s a direction, 0.8 of it
    between_bytes_per_s: float = 40e9  # 400 Gb/s InfiniBand a GPU, 0.8 of it
    latency_s: float = 30e-6  # of a collective, for each doubling of the ranks
    overlapped: float = 0.8  # share of the communication that finds arithmetic to hide behind
    tokens_per_gpu: int = 8192


def reproduced(measured: dict[str, Any]) -> list[dict[str, float]]:
    """Predict the runs of several ranks from the plain run and the link alone."""
    plan, cores = measured["plan"], measured["cores"]
    plain = statistics.median(measured["step_s"]["plain"])
    rows = []
    for ranks in (2, 3):
        share = plain * plan["of_ranks"][str(ranks)]["flops"] / plan["of_ranks"]["1"]["flops"]
        crowded = max(1.0, ranks / cores)
        sums = Link(**measured["links"][str(ranks)]).sum_s(
            ranks, plan["trained_tensors"], 4 * plan["trained_parameters"]
        )
        seen = statistics.median(measured["step_s"][f"torchrun {ranks}"])
        rows.append({"ranks": ranks, "predicted_s": share * crowded + sums, "measured_s": seen,
                     "efficiency": plain / (ranks * seen), "cores": cores})  # fmt: skip
    return rows


def on_gpus(model: LlamaConfig, name: str, gpus: int, assumed: Assumptions) -> dict[str, Any]:
    """Return what a step takes on `gpus` GPUs."""
    flops = model.flops_per_token(min(model.context_length, 4096)) * assumed.tokens_per_gpu
    arithmetic_s = flops / (assumed.peak_flops_per_s * assumed.utilization)
    rate = assumed.inside_bytes_per_s if gpus <= assumed.gpus_per_host else assumed.between_bytes_per_s
    sent = 3 * (gpus - 1) / gpus * 2 * model.parameter_count()
    collectives = 3 * model.num_layers
    sending_s = sent / rate + collectives * assumed.latency_s * (gpus - 1).bit_length()
    hidden_s = min(assumed.overlapped * sending_s, arithmetic_s)
    step_s = arithmetic_s + sending_s - hidden_s
    # bfloat16 weights, float32 sums, and AdamW's two states with a float32 copy: 2 + 4 + 12 bytes a parameter, shared
    return {
        "model": name, "gpus": gpus, "arithmetic_s": arithmetic_s, "sending_s": sending_s, "step_s": step_s,
        "efficiency": arithmetic_s / step_s, "tokens_per_s": gpus * assumed.tokens_per_gpu / step_s,
        "state_bytes_a_gpu": 18 * model.parameter_count() / gpus,
    }  # fmt: skip


def main() -> None:
    """Print both parts and write them."""
    measured = result("scale")
    if measured is None:
        raise SystemExit("run benchmarks/scale.py first")
    here = reproduced(measured)
    off = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in here]
    table: dict[str, Any] = {"here": here, "is_reproduced": max(off) < MOST_OFF}
    if table["is_reproduced"]:
        assumed = Assumptions()
        table["assumptions"] = asdict(assumed)
        table["on_gpus"] = [
            on_gpus(LlamaConfig.preset(name), name, gpus, assumed) for name in ("1b", "7b") for gpus in (8, 64, 1024)
        ]
    print(json.dumps(table, indent=1))
    write_result("scale_model", table)


if __name__ == "__main__":
    main()

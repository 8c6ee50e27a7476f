"""Merge, and measure what merging did.

In exact arithmetic a merged model is the adapted one. In the weights' own dtype it is not: the sum W + s B A is rounded
once, and an update much smaller than W may vanish in it. How much that moves the logits depends on the model, so it
is measured on tokens rather than promised.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entrenar.errors import GateFailed
from entrenar.peft.lora import merge, set_adapter, unmerge


@dataclass(frozen=True)
class MergeReport:
    """The change in logits from merging, over the probe's tokens.

    Attributes:
        largest_difference: max |Δlogit| between the merged and the unmerged model.
        adapter_effect: max |Δlogit| between the unmerged model and its base, to compare the former with.
        same_choice: share of the tokens after which both choose the same next token.
        tokens: the probe's length.
    """

    largest_difference: float
    adapter_effect: float
    same_choice: float
    tokens: int


def checked_merge(
    model: nn.Module, name: str, probe_ids: Int[Tensor, "B T"], *, refuse_above: float | None = None
) -> MergeReport:
    """Merge an adapter and compare the logits with the unmerged model's and the base's.

    Raises:
        GateFailed: the largest difference is above `refuse_above`, or is no number; the model is unmerged again.
        ConfigError: no adapter of that name is held, or one is merged already.
    """
    was_training = model.training
    model.eval()
    set_adapter(model, None)
    base = _logits(model, probe_ids)
    set_adapter(model, name)
    unmerged = _logits(model, probe_ids)
    merge(model)
    merged = _logits(model, probe_ids)
    model.train(was_training)
    report = MergeReport(
        largest_difference=float((merged - unmerged).abs().max()),
        adapter_effect=float((unmerged - base).abs().max()),
        same_choice=float((merged.argmax(-1) == unmerged.argmax(-1)).double().mean()),
        tokens=probe_ids.numel(),
    )
    # Written so that NaN is refused too.
    if refuse_above is not None and not report.largest_difference <= refuse_above:
        unmerge(model)
        raise GateFailed(
            f"merging moved a logit by {report.largest_difference:.3g}, more than the {refuse_above:g} allowed "
            f"(the adapter itself moves one by {report.adapter_effect:.3g}); keep it apart, or merge in float32"
        )
    return report


def _logits(model: nn.Module, probe_ids: Tensor) -> Float[Tensor, "B T V"]:
    with torch.no_grad():
        logits: Tensor = model(probe_ids)
    return logits.float()

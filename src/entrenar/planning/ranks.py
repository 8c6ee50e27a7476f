"""Plan a run of several ranks: what one of them takes, what it sends, and how much faster they are than one.

Each rank holds the whole model and its share of the rows, and all gradients are added up in float32, one tensor after
the other once the backward is done. So a step takes the arithmetic of a rank's share, plus what the link takes. Every
rank is taken to have a processor as fast as this one to itself.
"""

from dataclasses import dataclass

from entrenar.planning.run_plan import RunPlan
from entrenar.scale import Link, sent_bytes

_SUM_BYTES = 4  # a gradient is added up in float32, whatever the weights are stored in


@dataclass(frozen=True)
class RanksPlan:
    """A run of several ranks beside the same run of one.

    Attributes:
        share: one of the ranks.
        alone: one process with all rows.
    """

    ranks: int
    share: RunPlan
    alone: RunPlan
    link: Link

    @property
    def sent_bytes(self) -> int:
        """What each rank sends in a step, at least."""
        return sent_bytes(self.ranks, self._summed_bytes)

    @property
    def sum_s(self) -> float:
        """How long the ranks take to add up the gradients of a step."""
        return self.link.sum_s(self.ranks, self.share.step.trained_tensors, self._summed_bytes)

    @property
    def step_s(self) -> float:
        """How long a step takes."""
        return self.share.step.step_s + self.sum_s

    @property
    def alone_s(self) -> float:
        """How long one process takes, at the rates that were measured for a rank."""
        return self.share.step.rates.seconds(self.alone.step.flops, self.alone.step.moved_bytes)

    @property
    def efficiency(self) -> float:
        """The time of one process over the sum of the times of all ranks: 1 if no time is lost."""
        return self.alone_s / (self.ranks * self.step_s)

    @property
    def _summed_bytes(self) -> int:
        return _SUM_BYTES * self.share.step.trained_parameters

"""If a run does not fit: the changes that make it fit, cheapest first, each of them planned and not guessed.

The order is that of what a change costs: the same gradient in more pieces, then time, then precision of what is
trained, then another method, then shorter texts. Changes add up until the run fits; those that turned out not to be
needed are taken out again, dearest first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from entrenar.config import AnyConfig, FinetuneConfig, RunConfig
from entrenar.recipe.plan import RunPlan, plan_run

_SHORTEST = 128
# A change that saves less than this is not worth its price.
_LEAST_SAVING = 0.99

Flags = Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """Settings, as dotted keys, and what the run takes with them and with those of all changes before."""

    flags: Flags
    plan: RunPlan


@dataclass(frozen=True)
class Advice:
    """What makes a run fit.

    Attributes:
        changes: in the order they were made; together they are `flags`, whose plan is that of the last.
        fits: whether the last plan is within the limit; if not, it is the least possible.
    """

    changes: tuple[Change, ...]
    fits: bool

    @property
    def flags(self) -> dict[str, str]:
        """All settings to change."""
        return {key: value for change in self.changes for key, value in change.flags.items()}


def advise(
    read: Callable[[Flags], AnyConfig],
    unchanged: RunPlan,
    limit_bytes: int,
    on_change: Callable[[Change], None] = lambda _: None,
) -> Advice:
    """Find what makes a run fit into `limit_bytes`; `read` returns the config with settings over it."""

    def planned(flags: Flags) -> RunPlan:
        return plan_run(read(flags), unchanged.step.imports_bytes)

    made: list[Change] = []
    flags: dict[str, str] = {}
    least = unchanged.step.peak_bytes
    for change in _changes(read, flags):
        if least <= limit_bytes:
            break
        plan = planned({**flags, **change})
        if plan.step.peak_bytes < _LEAST_SAVING * least:
            flags |= change
            least = plan.step.peak_bytes
            made.append(Change(change, plan))
            on_change(made[-1])
    if least > limit_bytes:
        return Advice(tuple(made), fits=False)
    return Advice(_needed(made, planned, limit_bytes), fits=True)


def _needed(made: list[Change], planned: Callable[[Flags], RunPlan], limit_bytes: int) -> tuple[Change, ...]:
    """Take out what the run fits without, dearest first; the last change is needed, or the search had ended before."""
    for change in reversed(made[:-1]):
        rest = [other for other in made if other is not change]
        plan = planned({key: value for other in rest for key, value in other.flags.items()})
        if plan.step.peak_bytes <= limit_bytes:
            made = [*rest[:-1], Change(rest[-1].flags, plan)]
    return tuple(made)


def _changes(read: Callable[[Flags], AnyConfig], made: Flags) -> Iterator[Flags]:
    """Yield changes in the order of their cost; each looks at the config with those `made` so far."""
    section = "data" if isinstance(read({}), RunConfig) else "sft"
    while (rows := _rows(config := read(made))) > 1:
        fewer = rows // 2 if rows % 2 == 0 else 1
        accumulated = config.train.grad_accum_steps * (rows // fewer)
        yield {f"{section}.batch_size": str(fewer), "train.grad_accum_steps": str(accumulated)}
        if _rows(read(made)) == rows:
            break
    ways = ["none", "selective", "full"]
    for way in ways[ways.index(config.train.checkpointing) + 1 :]:
        yield {"train.checkpointing": way}
    if config.train.freed_memory == "keep":
        yield {"train.freed_memory": "return"}
    if config.train.precision == "float32":
        yield {"train.precision": "bfloat16"}
    if isinstance(config, FinetuneConfig):
        methods = ["full", "lora", "qlora"]
        yield from ({"method": method} for method in methods[methods.index(config.method) + 1 :])
    if config.train.offload == "none":
        yield {"train.offload": "disk"}
    if config.optim.optimizer != "adamw8bit":
        yield {"optim.optimizer": "adamw8bit"}
    while (length := _length(read(made))) > _SHORTEST:
        yield {f"{section}.seq_len": str(max(length // 2, _SHORTEST))}
        if _length(read(made)) == length:
            break


def _rows(config: AnyConfig) -> int:
    return config.data.batch_size if isinstance(config, RunConfig) else config.sft.batch_size


def _length(config: AnyConfig) -> int:
    return config.data.seq_len if isinstance(config, RunConfig) else config.sft.seq_len

"""Find the changes that make a run fit, cheapest first, each with a plan instead of a guess.

Changes are ordered by cost: the same gradient in more pieces, then time, then precision of what is
trained, then another method, then shorter texts. Changes add up until the run fits; those that turn out not to be
needed are taken out again, most expensive first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from entrenar.config import AnyConfig, FinetuneConfig
from entrenar.planning.run_plan import RunPlan, batches_of, plan_run

_SHORTEST = 128
# A change that saves less than this is not worth its price.
_LEAST_SAVING = 0.99

Flags = Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """Settings by dotted key, and the plan of the run with these and all earlier changes."""

    flags: Flags
    plan: RunPlan


@dataclass(frozen=True)
class Advice:
    """The changes that make a run fit.

    Attributes:
        changes: in the order they were made; together they are `flags`, and the last one's plan covers them all.
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
    base: Path | None,
    unchanged: RunPlan,
    limit_bytes: int,
    on_change: Callable[[Change], None] = lambda _: None,
) -> Advice:
    """Find what makes a run fit into `limit_bytes`.

    `read` returns the config with settings over it, `base` is the folder of the model to fine-tune.
    """

    def planned(flags: Flags) -> RunPlan:
        return plan_run(read(flags), base, unchanged.step.imports_bytes)

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
    """Take out changes that the run fits without, most expensive first.

    The last change is needed: without it the search would have ended before.
    """
    for change in reversed(made[:-1]):
        rest = [other for other in made if other is not change]
        plan = planned({key: value for other in rest for key, value in other.flags.items()})
        if plan.step.peak_bytes <= limit_bytes:
            made = [*rest[:-1], Change(rest[-1].flags, plan)]
    return tuple(made)


def _changes(read: Callable[[Flags], AnyConfig], made: Flags) -> Iterator[Flags]:
    """Yield changes in the order of their cost; each looks at the config with those `made` so far."""
    yield from _fewer_rows(read, made)
    yield from _cheaper_settings(read(made))
    yield from _shorter_rows(read, made)


def _fewer_rows(read: Callable[[Flags], AnyConfig], made: Flags) -> Iterator[Flags]:
    while (rows := batches_of(config := read(made)).batch_size) > 1:
        fewer = rows // 2 if rows % 2 == 0 else 1
        accumulated = config.train.grad_accum_steps * (rows // fewer)
        yield {f"{_table(config)}.batch_size": str(fewer), "train.grad_accum_steps": str(accumulated)}
        if batches_of(read(made)).batch_size == rows:
            return


def _cheaper_settings(config: AnyConfig) -> Iterator[Flags]:
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


def _shorter_rows(read: Callable[[Flags], AnyConfig], made: Flags) -> Iterator[Flags]:
    while (length := batches_of(config := read(made)).seq_len) > _SHORTEST:
        yield {f"{_table(config)}.seq_len": str(max(length // 2, _SHORTEST))}
        if batches_of(read(made)).seq_len == length:
            return


def _table(config: AnyConfig) -> str:
    return "sft" if isinstance(config, FinetuneConfig) else "data"

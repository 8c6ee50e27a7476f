"""Statements about the product's own index logic and schedules, decided by Z3 for all numbers.

The real source runs on the solver's numbers (`solving.py`). Each statement has a broken twin that the solver answers
with a counter-example, and premises that are checked to be fulfillable.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import z3

from ..mutants import mutant
from .solving import counter_example, paths, satisfiable

pytestmark = pytest.mark.proof

SHAPES = ("cosine", "linear", "constant", "wsd")
Claim = tuple[Any, list[Any]]  # what is claimed, and under which premises


class Cosines:
    """The cosine as an unknown function on [0, π] of which only this is known: its ends, its bounds, that it falls."""

    pi = math.pi

    def __init__(self) -> None:
        self.points: list[tuple[Any, Any]] = []

    def cos(self, angle: Any) -> Any:
        value = z3.Real(f"cos_{len(self.points)}")
        self.points.append((angle / math.pi, value))
        return value

    def known(self) -> list[Any]:
        facts = []
        for place, value in self.points:
            facts += [value >= -1, value <= 1, z3.Implies(place == 0, value == 1), z3.Implies(place == 1, value == -1)]
            facts += [z3.Implies(place <= other, value >= lower) for other, lower in self.points]
        return facts


class Schedule:
    """`lr_multiplier` of a module at symbolic steps of a symbolic run."""

    def __init__(self, module: ModuleType, shape: str) -> None:
        self.module, self.shape, self.cosines = module, shape, Cosines()
        module.math, module.float = self.cosines, lambda truth: z3.If(truth, z3.RealVal(1), z3.RealVal(0))
        self.warmup, self.total, self.ratio, self.decay = z3.Reals("warmup total ratio decay")
        self.premises = [
            self.warmup >= 0, self.total > z3.If(self.warmup > 1, self.warmup, 1), self.ratio >= 0, self.ratio <= 1,
            self.decay > 0, self.decay <= 1,
        ]  # fmt: skip
        self.first = z3.If(self.warmup > 1, self.warmup, z3.RealVal(1))

    def at(self, step: Any, premises: list[Any]) -> list[Claim]:
        """Return (value, premises) on each path."""
        config = SimpleNamespace(
            schedule=self.shape, warmup_steps=self.warmup, min_lr_ratio=self.ratio, wsd_decay_ratio=self.decay
        )
        ways = paths(lambda: self.module.lr_multiplier(config, step, self.total), [*self.premises, *premises])
        return [(way.result, [*self.premises, *premises, *way.condition]) for way in ways]


def bounds(schedule: Schedule) -> list[Claim]:
    step = z3.Real("step")
    ways = schedule.at(step, [step >= 1])
    return [(z3.And(value >= 0, value <= 1), [*given, *schedule.cosines.known()]) for value, given in ways]


def least_after_warmup(schedule: Schedule) -> list[Claim]:
    step = z3.Real("step")
    ways = schedule.at(step, [step >= schedule.first])
    return [(value >= schedule.ratio, [*given, *schedule.cosines.known()]) for value, given in ways]


def climbs(schedule: Schedule) -> list[Claim]:
    """Strictly, and up to the first full step."""
    early, late = z3.Reals("early late")
    order = [early > 0, early < late, late <= schedule.warmup]
    pairs = [(a, b, [*p, *q]) for a, p in schedule.at(early, order) for b, q in schedule.at(late, order)]
    return [(a < b, [*given, *schedule.cosines.known()]) for a, b, given in pairs if satisfiable(given)]


def falls(schedule: Schedule) -> list[Claim]:
    early, late = z3.Reals("early late")
    order = [schedule.first <= early, early <= late]
    pairs = [(a, b, [*p, *q]) for a, p in schedule.at(early, order) for b, q in schedule.at(late, order)]
    return [(a >= b, [*given, *schedule.cosines.known()]) for a, b, given in pairs if satisfiable(given)]


def full_at_the_joint(schedule: Schedule) -> list[Claim]:
    """Warm-up and decay meet at 1: the schedule is continuous there."""
    ways = schedule.at(schedule.first, [])
    return [(value == 1, [*given, *schedule.cosines.known()]) for value, given in ways]


def least_at_the_end(schedule: Schedule) -> list[Claim]:
    last = 1 if schedule.shape == "constant" else schedule.ratio
    ways = schedule.at(schedule.total, [])
    return [(value == last, [*given, *schedule.cosines.known()]) for value, given in ways]


def no_jumps(schedule: Schedule) -> list[Claim]:
    """Between two steps the rate moves by at most their distance in parts of the decay (cosine: see `falls`)."""
    early, late = z3.Reals("early late")
    order = [schedule.first <= early, early <= late]
    part = schedule.decay if schedule.shape == "wsd" else z3.RealVal(1)
    length = (schedule.total - schedule.first) * part
    pairs = [(a, b, [*p, *q]) for a, p in schedule.at(early, order) for b, q in schedule.at(late, order)]
    return [((a - b) * length <= late - early, given) for a, b, given in pairs if satisfiable(given)]


SCHEDULES: dict[str, tuple[Callable[[Schedule], list[Claim]], tuple[str, ...], tuple[str, str]]] = {
    "bounds": (bounds, SHAPES, (
        "config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape", "config.min_lr_ratio + shape")),
    "least after the warm-up": (least_after_warmup, SHAPES, (
        "min(max((step - first) / (last - first), 0.0), 1.0)", "max((step - first) / (last - first), 0.0)")),
    "climbs": (climbs, SHAPES, ("return step / config.warmup_steps", "return (step + 1) / config.warmup_steps")),
    "falls": (falls, SHAPES, ("max(0.0, 1.0 - (1.0 - progress)", "max(0.0, 1.0 - (0.9 - progress)")),
    "full at the joint": (full_at_the_joint, SHAPES, ("max(config.warmup_steps, 1), total_steps", "0, total_steps")),
    "least at the end": (least_at_the_end, SHAPES, ("(last - first), 0.0), 1.0)", "(last - first + 1), 0.0), 1.0)")),
    "no jumps": (no_jumps, ("linear", "wsd", "constant"), (
        "/ config.wsd_decay_ratio)", "/ config.wsd_decay_ratio**2)")),
}  # fmt: skip
# A twin changes the shapes that pass through the changed line.
TWIN_SHAPES = {
    "bounds": "linear", "least after the warm-up": "linear", "climbs": "linear", "falls": "wsd",
    "full at the joint": "linear", "least at the end": "linear", "no jumps": "wsd",
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [(name, s) for name, (_, shapes, _) in SCHEDULES.items() for s in shapes])
def test_the_schedule_is_as_its_picture(name, shape):
    """For all steps, run lengths, warm-ups and ratios, not only whole ones."""
    claims = SCHEDULES[name][0](Schedule(mutant("entrenar.train.schedule"), shape))
    assert claims
    assert [counter_example(*claim) for claim in claims] == [None] * len(claims)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_broken_schedule_yields_a_counter_example(name):
    """The solver names the numbers at which the planted error shows."""
    statement, _, twin = SCHEDULES[name]
    claims = statement(Schedule(mutant("entrenar.train.schedule", twin), TWIN_SHAPES[name]))
    assert any(counter_example(*claim) for claim in claims)


class Word:
    """A 64-bit number of numpy's, as the solver knows it: shifts are unsigned."""

    def __init__(self, bits: Any) -> None:
        self.bits = bits if isinstance(bits, z3.BitVecRef) else z3.BitVecVal(int(bits), 64)

    def __rshift__(self, other: "Word") -> "Word":
        return Word(z3.LShR(self.bits, other.bits))

    def __lshift__(self, other: "Word") -> "Word":
        return Word(self.bits << other.bits)

    def __and__(self, other: "Word") -> "Word":
        return Word(self.bits & other.bits)

    def __or__(self, other: "Word") -> "Word":
        return Word(self.bits | other.bits)

    def __xor__(self, other: "Word") -> "Word":
        return Word(self.bits ^ other.bits)

    def __add__(self, other: "Word") -> "Word":
        return Word(self.bits + other.bits)


def permuted(half_bits: int, *twin: tuple[str, str]) -> Claim:
    """Two different numbers of 2·half_bits bits go to different ones of as many bits, whatever mixes a round."""
    module = mutant("entrenar.data.corpus.permutation", *twin)
    mixed = z3.Function("mixed", z3.BitVecSort(64), z3.BitVecSort(64))
    module.np = SimpleNamespace(uint64=Word)
    module.mix64 = lambda word: Word(mixed(word.bits))
    keys = [Word(key) for key in z3.BitVecs("k0 k1 k2 k3 k4 k5", 64)]
    one, other = z3.BitVecs("one other", 64)
    size = z3.BitVecVal(1 << (2 * half_bits), 64)
    premises = [z3.ULT(one, size), z3.ULT(other, size), one != other]
    images = [module.feistel(Word(number), half_bits, keys).bits for number in (one, other)]
    return z3.And(images[0] != images[1], z3.ULT(images[0], size)), premises


@pytest.mark.parametrize("half_bits", [1, 2, 8, 16, 31])
def test_the_loaders_order_is_a_bijection(half_bits):
    """For all numbers, all keys and every mixing function: no window of an epoch is lost or comes twice."""
    assert counter_example(*permuted(half_bits)) is None


@pytest.mark.parametrize("twin", [
    ("left ^ (mix64(right + key) & mask)", "left | (mix64(right + key) & mask)"),
    ("left, right = value >> shift, value & mask", "left, right = value >> shift, value >> shift"),
])  # fmt: skip
def test_a_round_that_loses_bits_yields_a_counter_example(twin):
    """Two numbers with the same image are named."""
    assert counter_example(*permuted(4, twin)) is not None


def nearest(nf4: ModuleType, *, skew: Fraction = Fraction(0)) -> Claim:
    """The level that thresholds choose for a real x of [-1, 1] is as near as any other, and at most half a gap away."""
    levels = [Fraction(float(level)) for level in nf4.nf4_code_book()]
    middles = [(a + b) / 2 + skew for a, b in pairwise(levels)]
    x, chosen = z3.Real("x"), z3.RealVal(str(levels[-1]))
    for level, middle in zip(reversed(levels[:-1]), reversed(middles), strict=True):
        chosen = z3.If(x <= z3.RealVal(str(middle)), z3.RealVal(str(level)), chosen)

    def distance(level: Any) -> Any:
        return z3.If(x >= level, x - level, level - x)

    as_near = [distance(chosen) <= distance(z3.RealVal(str(level))) for level in levels]
    return z3.And(*as_near, distance(chosen) <= z3.RealVal("0.15191")), [x >= -1, x <= 1]


def test_nf4_takes_a_nearest_level_for_every_real_number(certificate):
    """Over all real numbers; the float32 thresholds are those of `nearest codes` in the bounded proofs."""
    assert counter_example(*nearest(mutant("entrenar.ops.quantized.nf4"))) is None
    certificate.add(
        "quantized_linear", "shapes", statement="nearest level, error at most 0.15191 of the magnitude", bound="all"
    )


def test_a_level_or_threshold_out_of_place_yields_a_counter_example():
    """A skewed threshold, and a level with a wrong digit where the bound on the error needs the right one."""
    assert counter_example(*nearest(mutant("entrenar.ops.quantized.nf4"), skew=Fraction(1, 1000))) is not None
    assert (
        counter_example(*nearest(mutant("entrenar.ops.quantized.nf4", ("-0.6961928009986877", "-0.6861928009986877"))))
        is not None
    )


def test_shares_of_targets_make_the_gradient_of_the_whole():
    """Sums over pieces divided once by all targets are the whole's mean; a mean of means is not."""
    a, b, n, m = z3.Reals("a b n m")
    premises = [n > 0, m > 0]
    assert counter_example((a + b) / (n + m) == a / n * (n / (n + m)) + b / m * (m / (n + m)), premises) is None
    assert counter_example(n / (n + m) + m / (n + m) == 1, premises) is None
    assert counter_example((a + b) / (n + m) == (a / n + b / m) / 2, premises) is not None

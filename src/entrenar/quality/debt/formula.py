"""The formula of the technical-debt score. All its numbers are here, and only here.

A finding is one place where a measured value exceeds its limit. It owes

    debt = rate · (value − limit)                                                   points,

and each of the six parts loses, of its weight W, the sum D of what its findings owe, dampened so that a part never
costs more than its weight and never stops falling:

    lost = W · (1 − exp(−D / W))          score = 100 − the sum over the parts of lost

Small debts cost what they owe (D ≪ W); ten times as much debt never costs ten times as much, but always costs more.
So a score falls strictly with each finding added and with each value made worse: nothing is divided by the size of
the file, so debt cannot be diluted by clean code around it. The score of a tree is the mean of its files' scores,
each file counted once: with weights by length, debt in a good file would draw weight away from a bad one and raise
the mean. Files that contain no code are not counted.

The weights are those of PMAT's technical-debt grading (structural 25, semantic 20, duplication 20, coupling 15,
documentation 10, consistency 10). The limits follow the literature where there is one: McCabe 1976 ("A Complexity
Measure", limit 10; the cost starts a little earlier), Campbell 2018 ("Cognitive Complexity", limit 15, likewise),
Kamiya et al. 2002 ("CCFinder") for clones as windows of normalized tokens. The rates are judgment.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from entrenar.errors import ConfigError

VERSION = 1  # a new one with every change to this file that can change a score

WEIGHTS = {
    "structural": 25.0,
    "cognitive": 20.0,
    "duplication": 20.0,
    "coupling": 15.0,
    "documentation": 10.0,
    "consistency": 10.0,
}

# The least score of each grade. Grades are compared by these numbers, never as text.
GRADES = (
    ("A+", 97.0), ("A", 93.0), ("A-", 90.0), ("B+", 85.0), ("B", 80.0), ("B-", 75.0),
    ("C+", 70.0), ("C", 65.0), ("C-", 60.0), ("D", 50.0), ("F", 0.0),
)  # fmt: skip

CLONE_TOKENS = 60  # length of the windows that are compared
CLONE_WORDS = 8  # of which at least so many are keywords, attributes, called or global names: tables are not clones


@dataclass(frozen=True)
class Rule:
    """The cost of one kind of finding: `rate` points for each unit above `limit`."""

    part: str
    limit: float
    rate: float
    unit: str

    def debt(self, value: float) -> float:
        """Return the points that a measured value owes."""
        return self.rate * max(0.0, value - self.limit)


RULES = {
    "cyclomatic": Rule("structural", 8, 0.4, "paths through a function"),
    "length": Rule("structural", 40, 0.1, "code lines of a function"),
    "nesting": Rule("structural", 3, 1.5, "levels of nested blocks in a function"),
    "parameters": Rule("structural", 6, 0.5, "parameters of a function"),
    "methods": Rule("structural", 20, 0.3, "methods of a class"),
    "file-length": Rule("structural", 400, 0.02, "code lines of a file"),
    "cognitive": Rule("cognitive", 8, 0.3, "cognitive complexity of a function, or of a file's top level"),
    "clone": Rule("duplication", 0, 0.02, "repeated tokens"),
    "imports": Rule("coupling", 10, 0.5, "files of the same tree that a file imports"),
    "packages": Rule("coupling", 8, 0.5, "third-party packages that a file imports"),
    "circle": Rule("coupling", 1, 1.0, "files that import each other in a circle"),
    "private": Rule("coupling", 0, 0.3, "uses of another object's private member"),
    "global": Rule("coupling", 0, 0.5, "functions' assignments to global names"),
    "star": Rule("coupling", 0, 1.0, "imports of *"),
    "undocumented-file": Rule("documentation", 0, 1.0, "public files without a docstring"),
    "undocumented-class": Rule("documentation", 0, 0.5, "public classes without a docstring"),
    "undocumented-function": Rule("documentation", 0, 0.3, "public functions without a docstring"),
    "untyped-return": Rule("documentation", 0, 0.1, "public functions that return something of unstated type"),
    "untyped-parameter": Rule("documentation", 0, 0.05, "parameters of unstated type"),
    "style": Rule("consistency", 0, 0.25, "lint findings"),
    "admitted": Rule("consistency", 0, 0.5, "TODO, FIXME, XXX and HACK, and suppressions that name no rule"),
}

# Which finding each of ruff's codes is; the longest matching prefix decides. ruff runs with these codes alone,
# without the project's settings and deaf to suppressions, so that the same code scores the same in every project.
LINT = {
    "PLW0603": "global",
    "SLF001": "private",
    "F403": "star",
    "D100": "undocumented-file",
    "D104": "undocumented-file",
    "D101": "undocumented-class",
    "D106": "undocumented-class",
    "D102": "undocumented-function",
    "D103": "undocumented-function",
    "ANN201": "untyped-return",
    "ANN205": "untyped-return",
    "ANN206": "untyped-return",
    "ANN001": "untyped-parameter",
    "FIX": "admitted",
    "PGH003": "admitted",
    "PGH004": "admitted",
    **dict.fromkeys(
        ("A", "B", "BLE", "C4", "E711", "E712", "E713", "E714", "E721", "E722", "E731", "E741", "ERA", "F",
         "N801", "N802", "N804", "N805", "N815", "N816", "PIE", "RET", "SIM", "UP", "W605"),
        "style",
    ),
}  # fmt: skip
# F405 repeats F403 for each name; strings in annotations may be in another language (F722, F821: jaxtyping's shapes).
LINT_IGNORED = ("F405", "F722", "F821")
LINT_IGNORED_IN_INIT = ("F401",)  # a package's __init__ imports what it re-exports
LINT_TARGET = "py38"  # modernization is asked for only where every supported Python has it


def lost(part: str, debt: float) -> float:
    """Return the points of its weight that a part loses to a sum of debts."""
    weight = WEIGHTS[part]
    return weight * (1.0 - math.exp(-debt / weight))


def score(debts: Mapping[str, float]) -> float:
    """Return the score, 0 to 100, of what each part owes."""
    return 100.0 - sum(lost(part, debts.get(part, 0.0)) for part in WEIGHTS)


def mean(scores: Iterable[float]) -> float:
    """Return the score of a tree from its files' scores.

    Raises: ValueError for none.
    """
    values = list(scores)
    if not values:
        raise ValueError("a mean of no scores does not exist")
    return math.fsum(values) / len(values)


def grade(value: float) -> str:
    """Return the grade of a score. A score is not rounded up to a grade."""
    return next((name for name, least in GRADES if value >= least), "F")


def least_score(name: str) -> float:
    """Return the least score of a grade.

    Raises: ConfigError for a grade that the table does not have.
    """
    table = dict(GRADES)
    if name not in table:
        raise ConfigError(f"a grade must be one of {', '.join(table)}; got {name!r}")
    return table[name]


def lint_rule(code: str) -> str | None:
    """Return which finding one of ruff's codes is, or None if it is none."""
    if code in LINT_IGNORED:
        return None
    return next((LINT[code[:length]] for length in range(len(code), 0, -1) if code[:length] in LINT), None)


def explanation() -> list[str]:
    """Return the formula as the lines that `--explain` prints."""
    lines = [
        f"Formula {VERSION}: a finding owes rate x (value - limit) points; a part of weight W with D points of debt",
        "loses W x (1 - exp(-D / W)); a file's score is 100 less what its parts lose; a tree's score is the mean of",
        "its files' scores.",
        "",
    ]
    for part, weight in WEIGHTS.items():
        lines.append(f"{part} (weight {weight:g})")
        lines += [
            f"  {name:<22} {rule.rate:>5g} a unit above {rule.limit:<4g} {rule.unit}"
            for name, rule in RULES.items()
            if rule.part == part
        ]
    lines += ["", "grades: " + ", ".join(f"{name} {least:g}" for name, least in GRADES)]
    return lines

"""Compare a tree's scores with the required grades, as numbers, never as labels."""

from collections.abc import Iterator
from dataclasses import dataclass

from entrenar.quality.debt import formula
from entrenar.quality.debt.rules import Rules
from entrenar.quality.debt.score import TreeScore


@dataclass(frozen=True)
class Violation:
    """A score below its demand."""

    what: str
    score: float
    least: float
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.score:.2f} {formula.grade(self.score)}, at least {self.least:g} "
            f"{formula.grade(self.least)} wanted; {self.remedy}"
        )  # fmt: skip


def violations(tree: TreeScore, rules: Rules, min_grade: str | None = None) -> list[Violation]:
    """Return the files below their grade, and the tree below its mean, worst first.

    `min_grade`, from the command line, is demanded of every file on top of the rules.
    """
    found = [*_of_files(tree, rules, min_grade)]
    if rules.min_mean_score is not None and tree.score is not None and tree.score < rules.min_mean_score:
        worst = min(tree.files, key=lambda file: file.score)
        found.append(
            Violation("all files", tree.score, rules.min_mean_score, f"begin with {worst.path} ({worst.score:.1f})")
        )
    return sorted(found, key=lambda row: (row.score - row.least, row.what))


def _of_files(tree: TreeScore, rules: Rules, min_grade: str | None) -> Iterator[Violation]:
    for file in tree.files:
        wanted = [grade for grade in (rules.grade_of(file.path), min_grade) if grade is not None]
        least = max(map(formula.least_score, wanted), default=0.0)
        if file.score < least:
            dear = max(file.findings, key=file.cost)
            yield Violation(
                file.path, file.score, least, f"most is lost in line {dear.line}: {dear.text} (-{file.cost(dear):.1f})"
            )

"""The andon cord of code quality: a run stops if the code that trains is worse than its baseline by more than 5 points.

As in a factory, anyone on the line may stop it: here it is the score, before the first step and at each checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import NotMeasured, QualityRegression
from entrenar.quality import git
from entrenar.quality.debt import baseline, measure, rules
from entrenar.quality.debt.report import score_fields
from entrenar.quality.debt.scoring import score_path


@dataclass(frozen=True)
class TrainingMonitor:
    """A score at the baseline and now; None where it was not measured."""

    baseline_tdg_score: float | None
    current_tdg_score: float | None
    max_score_drop: float = baseline.MAX_DROP

    def check_quality_regression(self, remedy: str = "") -> None:
        """Do nothing if the score has not dropped by more than the limit.

        Raises: QualityRegression if it has; NotMeasured if either score is missing.
        """
        before, now = self.baseline_tdg_score, self.current_tdg_score
        if before is None or now is None:
            raise NotMeasured("the andon cord needs a score at the baseline and one now; one was not measured")
        if round(before - now, baseline.DIGITS) > self.max_score_drop:
            details = f"{before:.2f} at the baseline, {now:.2f} now{f'; {remedy}' if remedy else ''}"
            raise QualityRegression(
                "\N{POLICE CARS REVOLVING LIGHT} ANDON CORD: Training halted due to quality regression. "
                f"Code quality dropped by >{self.max_score_drop:g} points. "
                f"Fix quality issues before resuming training. ({details})"
            )


def inspect_code(place: Path, project: Path) -> dict[str, Any]:
    """Compare a project's code with the baseline in a file; return its score and its git state.

    Raises: QualityRegression if the tree or one of its files dropped too far; ConfigError or FormatError for a baseline
    that is missing, damaged or by another scorer.
    """
    before, demanded = baseline.read(place), rules.load(project)
    tree = score_path(project / before.path, project, demanded.exclude)
    now = baseline.from_tree(tree, measure.scorer(), before.path)
    found = baseline.compare(before, now)
    worst = max((found.tree, *found.fell), key=lambda drop: drop.points)
    remedy = f"{worst.what}: `entrenar quality tdg {before.path} --explain` shows what costs most"
    TrainingMonitor(worst.before, worst.now, demanded.drop).check_quality_regression(remedy)
    return {**git_state(project), "score": score_fields(now.score), "baseline": before.score}


def git_state(folder: Path) -> Mapping[str, str | None]:
    """Return the commit that is checked out and the hash of what is not committed; nothing outside a repository."""
    repository = git.find(folder)
    return {} if repository is None else {"commit": repository.head(), "dirty": repository.dirty_hash()}

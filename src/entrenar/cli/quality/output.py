"""Shared by the verbs of the debt score: where output goes, and the rule that a gap is never a pass."""

from pathlib import Path

from entrenar.errors import NotMeasured
from entrenar.files import atomic_write
from entrenar.quality.debt.score import TreeScore


def emit(text: str, output: Path | None) -> None:
    """Print, or write a file."""
    if output is None:
        print(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, text + "\n")


def demand_whole(tree: TreeScore) -> None:
    """Raise NotMeasured if files of the tree have no score, or none has."""
    if tree.score is None:
        raise NotMeasured("no file of this tree has code; there is nothing to score")
    if tree.unmeasured:
        path, gap = next(iter(tree.unmeasured.items()))
        raise NotMeasured(
            f"{len(tree.unmeasured)} of {len(tree.files) + len(tree.unmeasured)} files have no score, "
            f"{path}:{gap.line} first ({gap.reason}); fix them or --exclude them"
        )

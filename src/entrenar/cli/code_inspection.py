"""Record the state of the training code in checkpoints, and stop the run if the code's quality fell."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any


def code_inspector(baseline: Path | None) -> Callable[[], Mapping[str, Any]]:
    """Return the callback of a run: git's state of the working folder, or with a baseline its score, held each time.

    With a baseline it is called once here, so that a run that must not begin neither makes nor deletes anything.

    Raises: QualityRegression, ConfigError, FormatError, MachineError: see `quality.andon`.
    """
    from entrenar.quality.andon import git_state, inspect_code  # noqa: PLC0415  # not needed by `--help`

    if baseline is None:
        return cache(partial(git_state, Path()))
    inspect = partial(inspect_code, baseline, Path())
    inspect()
    return inspect

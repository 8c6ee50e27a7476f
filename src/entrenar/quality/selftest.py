"""Show that a gate can fail: plant its violation in a scratch copy of the tree, and demand that it notices.

The copy holds what git tracks or would track. A plant is undone before the next gate; the tree itself is never written.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from entrenar.errors import ConfigError
from entrenar.quality import git
from entrenar.quality.commands import run
from entrenar.quality.gate import Gate, Plant, Result, judge


@dataclass(frozen=True)
class Trial:
    """A gate's response to its planted violation."""

    gate: Gate
    result: Result

    @property
    def noticed(self) -> bool:
        """True if the gate failed, and for the planted reason."""
        return self.result.verdict == "failed" and self.gate.expect in self.result.outcome.output + self.result.reason

    @property
    def fault(self) -> str:
        """The gate's fault, if it missed the violation."""
        if self.noticed:
            return ""
        if self.result.verdict != "failed":
            return f"{self.result.verdict} with the violation in place"
        return f"failed, but for another reason: its output has no {self.gate.expect!r}"


def trials(gates: Sequence[Gate], root: Path) -> Iterator[Trial]:
    """Yield, gate by gate, what each says to its violation."""
    with _scratch(root) as copy:
        for gate in gates:
            with _planted(copy, gate.plants):
                yield Trial(gate, judge(gate, run(gate.run, copy, gate.timeout_s, copy / "src")))


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="entrenar-selftest-") as folder:
        copy = Path(folder) / root.resolve().name
        for name in git.at(root).listed(root):
            source, target = root / name, copy / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield copy


@contextmanager
def _planted(copy: Path, plants: Sequence[Plant]) -> Iterator[None]:
    """Edit files of the copy; put them back afterwards.

    Raises: ConfigError for a plant whose text to replace is not there: it would test nothing.
    """
    before: dict[Path, bytes | None] = {}
    try:
        for plant in plants:
            place = copy / plant.file
            before.setdefault(place, place.read_bytes() if place.is_file() else None)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(_edited(plant, place), encoding="utf-8")
        yield
    finally:
        for place, content in before.items():
            if content is None:
                place.unlink(missing_ok=True)
            else:
                place.write_bytes(content)


def _edited(plant: Plant, place: Path) -> str:
    if plant.text is not None:
        return plant.text
    text = place.read_text(encoding="utf-8") if place.is_file() else ""
    if plant.old is None or plant.new is None or plant.old not in text:
        raise ConfigError(f"the plant of {plant.file} must replace text that is there; {plant.old!r} is not")
    return text.replace(plant.old, plant.new)

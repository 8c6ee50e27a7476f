"""Turn measurements into findings, debts and scores: of functions, of files, of the tree."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from entrenar.quality.debt import clones, formula
from entrenar.quality.debt.imports import Coupling, couplings
from entrenar.quality.debt.measure import Measured, Unmeasured


@dataclass(frozen=True)
class Finding:
    """A measured value above its limit, where, and the points that it owes."""

    rule: str
    line: int
    value: float
    text: str

    @property
    def part(self) -> str:
        """The part of the score that pays."""
        return formula.RULES[self.rule].part

    @property
    def debt(self) -> float:
        """Points owed, before the dampening."""
        return formula.RULES[self.rule].debt(self.value)


@dataclass(frozen=True)
class FunctionScore:
    """A function's score, from the findings that lie in it."""

    name: str
    line: int
    score: float


@dataclass(frozen=True)
class FileScore:
    """A file's score, the points that each part lost, and all findings in the order of lines."""

    path: str
    score: float
    lost: Mapping[str, float]
    findings: tuple[Finding, ...]
    functions: tuple[FunctionScore, ...]
    code_lines: int

    def cost(self, finding: Finding) -> float:
        """Return the points that a finding cost: its share, by debt, of what its part lost."""
        total = sum(other.debt for other in self.findings if other.part == finding.part)
        return self.lost[finding.part] * finding.debt / total


@dataclass(frozen=True)
class TreeScore:
    """The files of a tree with code, those that could not be measured, and those passed over as generated."""

    files: tuple[FileScore, ...]
    unmeasured: Mapping[str, Unmeasured]
    generated: tuple[str, ...]

    @property
    def score(self) -> float | None:
        """The mean of the files' scores; None if no file has code."""
        return formula.mean(file.score for file in self.files) if self.files else None


def score_tree(files: Mapping[str, Measured | Unmeasured], packages_above: Iterable[str] = ()) -> TreeScore:
    """Score files, given by path, as one tree: search all of them together for repeated code and imports."""
    measured = {path: found for path, found in files.items() if isinstance(found, Measured)}
    repeated = clones.find({path: found.windows for path, found in measured.items()})
    coupled = couplings({path: found.imports for path, found in measured.items()}, packages_above)
    scores = tuple(
        _score_file(path, found, repeated[path], coupled[path])
        for path, found in sorted(measured.items())
        if found.code_lines
    )
    gaps = {path: found for path, found in sorted(files.items()) if isinstance(found, Unmeasured)}
    return TreeScore(
        scores,
        {path: gap for path, gap in gaps.items() if not gap.is_generated},
        tuple(path for path, gap in gaps.items() if gap.is_generated),
    )


def _score_file(path: str, found: Measured, repeated: Iterable[clones.Clone], coupled: Coupling) -> FileScore:
    every = [*_structure(found), *_clones(path, repeated), *_coupling(coupled)]
    every += [Finding(rule, line, 1, text) for rule, line, text in found.linted.findings]
    findings = tuple(sorted((finding for finding in every if finding.debt > 0), key=lambda row: (row.line, row.rule)))
    lost = _lost(findings)
    functions = tuple(
        FunctionScore(function.name, function.line, 100.0 - sum(_lost(inside).values()))
        for function in found.functions
        for inside in [[row for row in findings if function.first <= row.line <= function.end]]
    )
    return FileScore(path, 100.0 - sum(lost.values()), lost, findings, functions, found.code_lines)


def _lost(findings: Iterable[Finding]) -> dict[str, float]:
    debts = dict.fromkeys(formula.WEIGHTS, 0.0)
    for finding in findings:
        debts[finding.part] += finding.debt
    return {part: formula.lost(part, debt) for part, debt in debts.items()}


def _structure(found: Measured) -> Iterator[Finding]:
    yield Finding("file-length", 1, found.code_lines, f"{found.code_lines} code lines in the file")
    top_level = found.cognitive.get(0, 0)
    yield Finding("cognitive", 1, top_level, f"top level: cognitive complexity {top_level}")
    for one in found.classes:
        yield Finding("methods", one.line, one.methods, f"{one.name}: {one.methods} methods")
    for function in found.functions:
        paths, cognitive = found.linted.cyclomatic[function.line], found.cognitive[function.first]
        for rule, value, words in (
            ("cyclomatic", paths, f"cyclomatic complexity {paths}"),
            ("cognitive", cognitive, f"cognitive complexity {cognitive}"),
            ("length", function.length, f"{function.length} code lines"),
            ("nesting", function.nesting, f"blocks nested {function.nesting} deep"),
            ("parameters", function.parameters, f"{function.parameters} parameters"),
        ):
            yield Finding(rule, function.line, value, f"{function.name}: {words}")


def _clones(path: str, repeated: Iterable[clones.Clone]) -> Iterator[Finding]:
    for clone in repeated:
        twin = f"line {clone.twin_line}" if clone.twin == path else f"{clone.twin}:{clone.twin_line}"
        lines = f"lines {clone.line} to {clone.end}"
        yield Finding("clone", clone.line, clone.tokens, f"{lines}: {clone.tokens} tokens that also stand at {twin}")


def _coupling(coupled: Coupling) -> Iterator[Finding]:
    yield Finding("imports", 1, len(coupled.files), f"imports {len(coupled.files)} files of this tree")
    packages = ", ".join(coupled.packages)
    yield Finding("packages", 1, len(coupled.packages), f"imports {len(coupled.packages)} packages: {packages}")
    circle = ", ".join(coupled.circle[:4]) + (" …" if len(coupled.circle) > 4 else "")
    yield Finding("circle", 1, len(coupled.circle), f"imports in a circle of {len(coupled.circle)}: {circle}")

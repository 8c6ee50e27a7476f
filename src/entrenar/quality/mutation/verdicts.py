"""Plant mutants and keep the verdicts, so that only what changed runs again.

A verdict is kept while that on which it rests stays: the mutated function and the operators; for a killed mutant the
file of the test that killed it; for a survivor every test it was tried against; for both the files that tests share.
Timeouts and errors are no verdicts and are tried again each time.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, FormatError, GateFailed
from entrenar.files import atomic_write, explained_disk_errors
from entrenar.quality.mutation.mutants import OPERATORS_VERSION, MutableFile, Mutant
from entrenar.quality.risk import Component

LEAST_LIMIT_S = 5
_DEFAULT_SELECTION = "not slow and not chaos and not fuzz and not gpu"


@dataclass(frozen=True)
class Verdict:
    """One mutant and its verdict: killed, survived, timeout or error."""

    file: str
    line: int
    function: str
    operator: str
    code: str
    original: str
    mutated: str
    occurrence: int
    status: str
    killed_by: str = ""
    how: str = ""
    reason: str = ""
    key: str = ""


class Project:
    """A tree of sources and tests, in the form that the keys of verdicts use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[Path, str] = {}

    def file(self, path: str) -> MutableFile:
        """Return the mutants of one file.

        Raises: ConfigError if it is missing or no Python.
        """
        try:
            return MutableFile((self.root / path).read_text(encoding="utf-8"), path)
        except (OSError, SyntaxError) as fault:
            raise ConfigError(f"{path} must be a Python file of {self.root} to be mutated: {fault}") from fault

    def key(self, function: str, status: str, killed_by: str, component: Component) -> str:
        """Return a digest of all that a verdict rests on."""
        tests = [killed_by.partition("::")[0]] if status == "killed" else component.tests
        paths = {path for test in tests for path in self._python(test)} | set(self._shared_by_tests())
        words = [str(OPERATORS_VERSION), function, *(self._digest(path) for path in sorted(paths))]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

    def _python(self, test: str) -> Iterator[Path]:
        path = self.root / test
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]

    def _shared_by_tests(self) -> Iterator[Path]:
        for path in self._python("tests"):
            if path.name == "conftest.py":
                yield path

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        return self._digests[path]


def mutate(
    project: Project,
    components: Sequence[Component],
    known: Sequence[Verdict] = (),
    *,
    jobs: int = 1,
    until: float = math.inf,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """Return a verdict on every mutant of the components' files; those of `known` that still hold are not run again.

    Mutants that never had a verdict come first. At the time `until` the rest keep the verdict they had; one that had
    none is an error, and so counts as without a verdict.

    Raises:
        ConfigError: a file is missing.
        GateFailed: the unchanged tests fail, so that nothing can be learned from them.
    """
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(_component, project, component, known, until, on_verdict) for component in components]
        return [verdict for run in runs for verdict in run.result()]


def _component(
    project: Project,
    component: Component,
    known: Sequence[Verdict],
    until: float,
    on_verdict: Callable[[Verdict], None],
) -> list[Verdict]:
    files = {path: project.file(path) for path in component.files}
    before = {(v.file, _name(v)): v for v in known}
    kept: dict[tuple[str, str], Verdict] = {}
    todo: dict[tuple[str, str], Mutant] = {}
    functions = {}
    for path, file in files.items():
        for site in file.sites:
            place = (path, site.mutant.name)
            functions[place] = file.functions[site.outer_function]
            old = before.get(place)
            key = old and project.key(functions[place], old.status, old.killed_by, component)
            if old is not None and old.key == key and old.status in ("killed", "survived"):
                kept[place] = replace(old, line=site.mutant.line)
            else:
                todo[place] = site.mutant
    for record in _work(project, component, sorted(todo, key=before.__contains__), until) if todo else ():
        place = (record["path"], record["name"])
        verdict = _verdict(todo[place], record)
        verdict = replace(verdict, key=project.key(functions[place], verdict.status, verdict.killed_by, component))
        on_verdict(verdict)
        kept[place] = verdict
    for place in set(todo) - set(kept):
        untried = _verdict(todo[place], {"status": "error", "reason": "not tried: the time was up"})
        kept[place] = replace(before[place], line=todo[place].line) if place in before else untried
    return [kept[path, site.mutant.name] for path, file in files.items() for site in file.sites]


def _name(verdict: Verdict) -> str:
    return f"{verdict.function} | {verdict.code} | {verdict.original} -> {verdict.mutated} | {verdict.occurrence}"


def _verdict(mutant: Mutant, record: dict[str, Any]) -> Verdict:
    return Verdict(
        mutant.path, mutant.line, mutant.function, mutant.operator, mutant.code, mutant.before, mutant.after,
        mutant.occurrence, record["status"],
        record.get("killed_by", ""), record.get("how", ""), record.get("reason", ""),
    )  # fmt: skip


def _work(
    project: Project, component: Component, todo: Sequence[tuple[str, str]], until: float
) -> Iterator[dict[str, Any]]:
    """Run a worker on the mutants; yield what it says of each."""
    tests = [test for test in component.tests if (project.root / test).exists()]
    if not tests:
        raise ConfigError(f"{component.name}: none of its tests exists: {', '.join(component.tests)}")
    job = {
        "files": list(component.files),
        "mutants": todo,
        "until": until,
        "tests": tests,
        "select": _DEFAULT_SELECTION,
        "least_limit_s": LEAST_LIMIT_S,
    }
    here = str(Path(__file__).parents[3])
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        job_file, log = Path(folder) / "job.json", Path(folder) / "log"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with log.open("w", encoding="utf-8") as sink:
            command = [sys.executable, "-m", "entrenar.quality.mutation.worker", str(job_file)]
            worker = subprocess.Popen(
                command, cwd=project.root, env=environment, stdout=subprocess.PIPE, stderr=sink, text=True
            )
            with worker:
                yield from _records(component, worker.stdout or ())
        if worker.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise GateFailed(f"{component.name}: the tests could not be run (exit {worker.returncode}):\n{tail}")


def _records(component: Component, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a worker's verdicts; check what it says of the tests themselves."""
    for line in lines:
        record = json.loads(line)
        if record["kind"] == "mutant":
            yield record
        else:
            _demand_sound(component, record)


def _demand_sound(component: Component, record: dict[str, Any]) -> None:
    """Stop if the unchanged code fails, or if the runner kills a no-op mutant."""
    if record["kind"] == "fault":
        raise GateFailed(f"{component.name}: {record['message']}")
    for failure in record.get("failures", []):
        raise GateFailed(
            f"{component.name}: {failure['killed_by']} fails without any mutant ({failure['message']}); fix it first"
        )
    if record["kind"] == "control" and record["status"] != "survived":
        raise GateFailed(
            f"{component.name}: a mutant that changes nothing came out as {record}; verdicts would be wrong"
        )


def merged(before: Sequence[Verdict], found: Sequence[Verdict]) -> list[Verdict]:
    """Return all verdicts, those of `found` in the place of older ones on the same mutants."""
    verdicts = {(verdict.file, _name(verdict)): verdict for verdict in [*before, *found]}
    return list(verdicts.values())


def write_verdicts(path: Path, verdicts: Sequence[Verdict], summary: dict[str, Any]) -> None:
    """Write the summary, and each mutant on a line of its own, so that a change of one is a change of one line."""
    rows = ",\n  ".join(json.dumps({k: v for k, v in asdict(verdict).items() if v != ""}) for verdict in verdicts)
    head = json.dumps(summary, indent=1).removesuffix("\n}")
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f'{head},\n "mutants": [\n  {rows}\n ]\n}}\n')


def read_verdicts(path: Path) -> list[Verdict]:
    """Read the verdicts of an earlier run; none if there was none.

    Raises: FormatError.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return [Verdict(**row) for row in table["mutants"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as fault:
        raise FormatError(f"{path} is not what `entrenar quality mutate` writes: {fault!r}; delete it") from fault

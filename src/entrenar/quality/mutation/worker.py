"""The process that plants mutants: it collects the tests once and forks a child for each mutant.

A child exchanges the code object of one function, runs the tests that reach the mutated line, the most telling first,
and reports the first that fails, as a line of JSON. Nothing is written to the sources, nothing is imported twice, and
decorated functions count like others, since the function object itself is changed wherever it is held.

    python -m entrenar.quality.mutation.worker JOB.json

It runs with one thread throughout: a forked child of a process whose OpenMP pool has started hangs for ever in its
first parallel region, which would be taken for a mutant that loops.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import coverage
import pytest
from _pytest.runner import runtestprotocol

from entrenar.quality.mutation.mutants import MutableFile, Site

_LIMIT_FACTOR, _WALL_FACTOR = 10, 30  # the second for machines that have other work


class Worker:
    """A pytest plugin that takes the place of the run loop."""

    def __init__(self, job: dict[str, Any], results: TextIO) -> None:
        self.job, self.results = job, results
        self.root = Path.cwd()
        self.files = {path: MutableFile(Path(path).read_text(encoding="utf-8"), path) for path in job["files"]}
        self.kills: dict[tuple[str, str], int] = {}

    def pytest_collection(self) -> None:
        """Draw few examples, the same each time: a verdict must not depend on luck."""
        import hypothesis  # noqa: PLC0415 - pytest must be the first to import it

        try:
            hypothesis.settings.get_profile("mutation")  # a project may have its own
        except hypothesis.errors.InvalidArgument:
            generate = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutation", max_examples=15, derandomize=True, database=None, deadline=None, phases=generate
            )
        hypothesis.settings.load_profile("mutation")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a test file that cannot be imported."""
        if report.failed:
            self._report({"kind": "fault", "message": f"{report.nodeid} cannot be collected: {report.longrepr}"})

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Learn which test reaches which line, then try each mutant in a child."""
        if session.testsfailed or not session.items:
            self._report({"kind": "fault", "message": "there is no test to run"})
            return True
        for path in self.files:
            importlib.import_module(_module_name(path))
        for cache in _caches():
            cache.cache_clear()
        items = {item.nodeid: item for item in session.items}
        base = self._baseline(session)
        self._report({"kind": "baseline", "tests": len(items), **{k: base[k] for k in ("elapsed_s", "failures")}})
        if base["failures"]:
            return True
        for name in base["modules"]:
            _preload(name)
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1:
            self._report({"kind": "fault", "message": f"{threads} threads run before the first fork; want 1"})
            return True
        functions = _functions(self.files)
        gc.collect()
        gc.freeze()
        everything = list(items.values())
        control = _fork([_control], _control.__code__, everything, self._limits(everything, base["seconds"]))
        self._report({"kind": "control", **control})
        if control["status"] != "survived":
            return True
        sites = {(path, site.mutant.name): site for path, file in self.files.items() for site in file.sites}
        for path, name in self.job["mutants"]:
            if time.monotonic() > self.job["until"]:
                break
            site = sites[path, name]
            tests = [items[test] for test in self._order(site, base)]
            self._try(site, self.files[path], functions, tests, base["seconds"])
        return True

    def _baseline(self, session: pytest.Session) -> dict[str, Any]:
        """Run all tests once in a child, under coverage with one context a test."""
        with tempfile.NamedTemporaryFile("r", suffix=".json", encoding="utf-8") as file:
            child = os.fork()
            if child == 0:
                with _ending_here():
                    _quieten()
                    Path(file.name).write_text(json.dumps(_observe(session, list(self.files))), encoding="utf-8")
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"the unchanged tests ended with status {status}")
            facts: dict[str, Any] = json.loads(file.read())
            return facts

    def _order(self, site: Site, base: dict[str, Any]) -> list[str]:
        """Return the tests that reach the site: those that killed most in its function first, then the fastest."""
        mutant, lines = site.mutant, base["lines"].get(site.mutant.path, {})
        statement = range(mutant.first_line, mutant.last_line + 1)
        reaching = {test for line in statement for test in lines.get(str(line), ())}
        seconds: dict[str, float] = base["seconds"]
        return sorted(reaching, key=lambda test: (-self.kills.get((mutant.function, test), 0), seconds[test]))

    def _try(
        self,
        site: Site,
        file: MutableFile,
        functions: dict[tuple[str, str, int], list[types.FunctionType]],
        tests: Sequence[pytest.Item],
        seconds: dict[str, float],
    ) -> None:
        mutant = site.mutant
        record: dict[str, Any] = {"kind": "mutant", "path": mutant.path, "name": mutant.name, "reached_by": len(tests)}
        if tests:
            targets = functions.get((mutant.path, site.outer_function, site.outer_line), [])
            code = file.code_with(site)
            record |= _fork(targets, code, tests, self._limits(tests, seconds))
        else:
            record |= {"status": "survived", "reason": "no test reaches it"}
        if record["status"] == "killed":
            key = (mutant.function, record["killed_by"])
            self.kills[key] = self.kills.get(key, 0) + 1
        record["tests"] = sorted({test.nodeid.partition("::")[0] for test in tests})
        self._report(record)

    def _limits(self, tests: Sequence[pytest.Item], seconds: dict[str, float]) -> list[int]:
        """Return the CPU time that each test may take: many times what it takes on the unchanged code."""
        return [int(_LIMIT_FACTOR * seconds[test.nodeid]) + int(self.job["least_limit_s"]) for test in tests]

    def _report(self, record: dict[str, Any]) -> None:
        self.results.write(json.dumps(record) + "\n")
        self.results.flush()


def _observe(session: pytest.Session, paths: list[str]) -> dict[str, Any]:
    """Run every test; return which tests reach which line, how long each took, who failed, the imported modules.

    A cache of the mutated files is emptied before each test: what the first test filled would hide the others.
    """
    recorder = coverage.Coverage(data_file=None, include=paths, config_file=False)
    before, failures, seconds = set(sys.modules), [], {}
    caches = _caches({str(Path(path).resolve()) for path in paths})
    started = time.process_time()
    recorder.start()
    for item, following in _pairs(session.items):
        for cache in caches:
            cache.cache_clear()
        recorder.switch_context(item.nodeid)
        began = time.process_time()
        failed = _first_failure(item, following)
        seconds[item.nodeid] = time.process_time() - began
        if failed:
            failures.append(failed)
    recorder.stop()
    data = recorder.get_data()
    lines = {path: data.contexts_by_lineno(str(Path(path).resolve())) for path in paths}
    return {
        "lines": {p: {line: [t for t in tests if t] for line, tests in found.items()} for p, found in lines.items()},
        "seconds": seconds,
        "failures": failures,
        "modules": [name for name in sys.modules if name not in before],
        "elapsed_s": time.process_time() - started,
    }


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip(items, [*items[1:], None], strict=True)


def _first_failure(item: pytest.Item, following: pytest.Item | None) -> dict[str, str] | None:
    """Run one test; return who failed and how, or None."""
    for report in runtestprotocol(item, log=False, nextitem=following):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else str(report.longrepr)[-300:]
            kind = message.split("\n")[0].partition(":")[0].rpartition(".")[2]
            asserted = message.startswith("assert ") or kind in ("AssertionError", "Failed", "GradcheckError")
            return {"killed_by": report.nodeid, "how": "assertion" if asserted else "crash", "message": message[:160]}
    return None


def _fork(
    targets: Sequence[Callable[..., Any]], code: types.CodeType, tests: Sequence[pytest.Item], limits_s: Sequence[int]
) -> dict[str, Any]:
    """Run the tests against the mutated function in a child that the kernel stops when a test exceeds its CPU time."""
    if not targets:
        return {"status": "error", "reason": "the function is created at each call and cannot be replaced"}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with _ending_here():
            os.close(reading)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.setsid()
            _quieten()
            for function in targets:
                function.__code__ = code
            os.write(writing, json.dumps(_verdict(tests, limits_s)).encode())
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test of a mutant may have left running
    return _outcome(answer, status)


@contextlib.contextmanager
def _ending_here() -> Iterator[None]:
    """End the process with the block, also by an exception: a child must never go on as its parent would."""
    status = 1
    try:
        yield
        status = 0
    finally:
        os._exit(status)


def _outcome(answer: bytes, status: int) -> dict[str, Any]:
    if answer:
        verdict: dict[str, Any] = json.loads(answer)
        return verdict
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL):
        return {"status": "timeout"}
    return {"status": "error", "reason": f"the tests ended with status {status} and no verdict"}


def _verdict(tests: Sequence[pytest.Item], limits_s: Sequence[int]) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="mutant-")
    tests[0].config._tmp_path_factory._basetemp = Path(folder)  # type: ignore[attr-defined]
    for (item, following), limit_s in zip(_pairs(tests), limits_s, strict=True):
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit_s, resource.RLIM_INFINITY))
        signal.alarm(_WALL_FACTOR * limit_s)
        failed = _first_failure(item, following)
        if failed:
            return {"status": "killed", **failed}
    return {"status": "survived"}


def _control() -> None:
    """Stand for a mutant that changes nothing: a runner that kills it would kill anything."""


def _functions(files: dict[str, MutableFile]) -> dict[tuple[str, str, int], list[types.FunctionType]]:
    """Find every function object made from the files, however it is wrapped or held."""
    paths = {str(Path(path).resolve()): path for path in files}
    found: dict[tuple[str, str, int], list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename in paths:  # isinstance would ask proxies
            code = thing.__code__
            found.setdefault((paths[code.co_filename], code.co_qualname, code.co_firstlineno), []).append(thing)
    return found


def _caches(paths: Container[str] | None = None) -> "list[functools._lru_cache_wrapper[Any]]":
    """Find every functools.cache, or those of the files: what a test filled was computed without a mutant."""
    found = [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]
    if paths is None:
        return found
    return [cache for cache in found if getattr(cache.__wrapped__, "__code__", _control.__code__).co_filename in paths]


def _module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "src" else parts)


def _preload(name: str) -> None:
    """Import what the tests import late, so that no child pays for it."""
    try:
        importlib.import_module(name)
    except (Exception, SystemExit):  # noqa: BLE001 - a stranger's module may raise anything
        sys.modules.pop(name, None)


def _quieten() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def main(job_file: str) -> int:
    """Collect the job's tests and try its mutants; return pytest's exit code, 0 also if nothing could be learned."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:terminalreporter", "-m", job["select"]]
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results, tempfile.TemporaryDirectory() as folder:
        os.dup2(2, 1)  # what tests print is no result
        tempfile.tempdir = folder
        return int(pytest.main([*options, *job["tests"]], plugins=[Worker(job, results)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

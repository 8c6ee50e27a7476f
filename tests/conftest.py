"""Fixtures for every test: one thread, fixed seeds, counted properties, the real data when it lies beside the project.

`--certificate PATH` keeps what the tests showed about each operation. `--count-cases` prints how many cases each
property passed, `--cases-file PATH` keeps that beside the figures of properties that did not run, `--cases N` runs N of
each, whatever it asks for itself. `--power` plants each property's own mutant and demands that the property fails.
`--hypothesis-profile` takes one of the profiles below.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from .certificate import Certificate
from .mutants import planted

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# A busy machine is no fault of the code under test, and a fixed seed in a fixture is meant: no deadlines.
COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}
REPEATABLE: dict[str, Any] = {"derandomize": True, "database": None, "phases": (Phase.explicit, Phase.generate)}
settings.register_profile("tier1", max_examples=10, **REPEATABLE, **COMMON)
settings.register_profile("tier2", max_examples=100, **COMMON)
settings.register_profile("tier3", max_examples=10_000, **COMMON)
settings.register_profile("mutation", max_examples=15, **REPEATABLE, **COMMON)
settings.load_profile("tier2")

CERTIFICATE = pytest.StashKey[Certificate]()
CASES = pytest.StashKey[dict[str, int]]()
HELD = pytest.StashKey[dict[str, dict[str, Any]]]()
KILLED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--certificate", type=Path, help="write what was shown about each operation to this JSON file")
    parser.addoption("--count-cases", action="store_true", help="print how many cases each property passed")
    parser.addoption("--cases-file", type=Path, help="keep the counts in this JSON file")
    parser.addoption("--cases", type=int, help="run this many cases of each property")
    parser.addoption("--power", action="store_true", help="run each property against the mutant that it must kill")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CERTIFICATE] = Certificate()
    config.stash[CASES] = {}
    config.stash[HELD] = {}
    config.stash[KILLED] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Count the cases that a property passes, or hold it against its mutant."""
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    marker = item.get_closest_marker("property")
    if handle is None or marker is None:
        return (yield)
    if item.config.getoption("--power"):
        return (yield from killing(item))
    if item.config.getoption("--cases"):
        asked = item.obj._hypothesis_internal_use_settings
        item.obj._hypothesis_internal_use_settings = settings(asked, max_examples=item.config.getoption("--cases"))
    inner, cases = handle.inner_test, item.config.stash[CASES]
    cases[item.nodeid], started = 0, time.process_time()
    handle.inner_test = counted(inner, cases, item.nodeid)
    try:
        result = yield
    finally:
        handle.inner_test = inner
    item.config.stash[HELD][item.nodeid] = {
        "cases": cases[item.nodeid], "cpu_s": round(time.process_time() - started, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    for op in marker.args:
        item.config.stash[CERTIFICATE].add(op, "property", test=item.nodeid, cases=cases[item.nodeid])
    return result


def killing(item: pytest.Item) -> Iterator[None]:
    """Run a property while its mutant is planted; its failing is the success."""
    mutant = item.get_closest_marker("kills")
    if mutant is None:
        pytest.fail("this property names no mutant that it kills: mark it kills(module, old, new)")
    module, old, new = mutant.args
    with planted(f"entrenar.{module}", old, new):
        try:
            yield
        except AssertionError:  # anything else is no verdict of the property, and fails it
            item.config.stash[KILLED][item.nodeid] = f"{module}: {old!r} -> {new!r}"
            return
    pytest.fail(f"the property holds although {module} has {new!r} for {old!r}")


def counted(inner: Callable[..., Any], cases: dict[str, int], name: str) -> Callable[..., Any]:
    """Return a property that counts each case it passes."""

    @functools.wraps(inner)
    def passed(*arguments: Any, **values: Any) -> Any:
        result = inner(*arguments, **values)
        cases[name] += 1
        return result

    return passed


def keep_counts(path: Path, held: dict[str, dict[str, Any]]) -> None:
    """Write how many cases each property held in, the older figures of others beside them."""
    before = json.loads(path.read_text(encoding="utf-8"))["properties"] if path.is_file() else {}
    rows = dict(sorted((before | held).items()))
    total = {"count": len(rows), "cases": sum(row["cases"] for row in rows.values())}
    path.write_text(json.dumps({**total, "properties": rows}, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--count-cases"):
        cases = config.stash[CASES]
        for name, count in cases.items():
            terminalreporter.write_line(f"[property] passed {count} cases: {name}")
        terminalreporter.write_line(f"[property] {len(cases)} properties, {sum(cases.values())} cases")
    counts = config.getoption("--cases-file")
    if counts is not None:
        keep_counts(counts, config.stash[HELD])
    for name, mutant in config.stash[KILLED].items():
        terminalreporter.write_line(f"[power] {name.split('::')[1]} kills {mutant}")
    path = config.getoption("--certificate")
    if path is not None:
        config.stash[CERTIFICATE].write(path)


@pytest.fixture(scope="session")
def certificate(pytestconfig: pytest.Config) -> Certificate:
    """Where a test keeps what it showed about an operation."""
    return pytestconfig.stash[CERTIFICATE]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights, tokenizers and texts; the test is skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at ../shared/data (looked in {SHARED_DATA})")
    return SHARED_DATA

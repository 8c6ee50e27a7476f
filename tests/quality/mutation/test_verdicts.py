"""Mutants are killed by tests that notice them and by nothing else; verdicts are kept exactly as long as they hold."""

import json
import os
import subprocess
import sys

import pytest

from entrenar.errors import ConfigError, FormatError, GateFailed
from entrenar.quality.mutation.verdicts import Project, Verdict, merged, mutate, read_verdicts, write_verdicts
from entrenar.quality.risk import Component

from ..conftest import BETTER, TESTS  # isort: skip

TOY = Component("toy", ("toy.py",), ("tests",), mutation=80)


def statuses(verdicts: list[Verdict]) -> dict[str, str]:
    return {f"{verdict.original} -> {verdict.mutated}": verdict.status for verdict in verdicts}


def test_tests_kill_what_they_notice(toy):
    """Of the toy's mutants those of `double` die by the name of its test; the untested branch lets its own live."""
    found = statuses(mutate(Project(toy), [TOY]))
    assert found == {
        "x * 2 -> x / 2": "killed",
        "x * 2 -> x": "killed",
        "x * 2 -> 2": "killed",
        "2 -> 3": "killed",
        "2 -> 1": "killed",
        "if x > most -> if False": "survived",
        "if x > most -> if True": "killed",
        "x > most -> x >= most": "survived",
        "x > most -> x <= most": "killed",
    }


def test_the_killer_and_its_way_are_named(toy):
    """A failed assertion and a crash are told apart, and the first test that failed is named."""
    (toy / "toy.py").write_text("def pair(x):\n    first, second = x[0:2]\n    return first - second\n")
    (toy / "tests" / "test_toy.py").write_text(
        "from toy import pair\n\ndef test_pair():\n    assert pair([5, 3, 1]) == 2\n"
    )
    verdicts = {v.mutated: v for v in mutate(Project(toy), [TOY])}
    assert verdicts["first + second"].how == "assertion"
    assert verdicts["0:"].how == "crash"
    assert {v.killed_by for v in verdicts.values()} == {"tests/test_toy.py::test_pair", ""}


def test_only_what_changed_runs_again(toy):
    """Unchanged, nothing runs; with a better test only the survivors do; after an edit only its function does."""
    project = Project(toy)
    first = mutate(project, [TOY])
    ran: list[Verdict] = []
    assert mutate(project, [TOY], first, on_verdict=ran.append) == first
    assert ran == []
    (toy / "tests" / "test_more.py").write_text(TESTS.splitlines()[0] + BETTER)
    second = mutate(Project(toy), [TOY], first, on_verdict=ran.append)
    assert {verdict.mutated for verdict in ran} == {"if False", "x >= most"}
    assert statuses(second)["if x > most -> if False"] == "killed"
    (toy / "toy.py").write_text((toy / "toy.py").read_text().replace("x * 2", "x * 2 + 0"))
    ran.clear()
    mutate(Project(toy), [TOY], second, on_verdict=ran.append)
    assert {verdict.function for verdict in ran} == {"double"}


def test_when_time_is_up_the_rest_keep_what_is_known(toy):
    """Known verdicts stay; mutants of new code without any are errors, which the gate counts."""
    first = mutate(Project(toy), [TOY])
    (toy / "tests" / "test_toy.py").write_text(TESTS + "\n")
    assert mutate(Project(toy), [TOY], first, until=0.0) == first
    (toy / "toy.py").write_text((toy / "toy.py").read_text() + "\n\ndef triple(x):\n    return x * 3\n")
    late = mutate(Project(toy), [TOY], first, until=0.0)
    assert {v.status for v in late if v.function == "triple"} == {"error"}
    assert {v.reason for v in late if v.status == "error"} == {"not tried: the time was up"}


def test_a_weaker_test_wakes_the_dead(toy):
    """A kill does not outlive the test that made it."""
    first = mutate(Project(toy), [TOY])
    (toy / "tests" / "test_toy.py").write_text(TESTS.replace("double(3) == 6", "double(3) > 0"))
    assert statuses(mutate(Project(toy), [TOY], first))["2 -> 3"] == "survived"


def test_a_mutant_that_loops_is_no_kill(toy, monkeypatch):
    """A timeout has its own verdict, and is tried again the next time."""
    (toy / "toy.py").write_text("def count(n):\n    while n > 0:\n        n -= 1\n    return n\n")
    (toy / "tests" / "test_toy.py").write_text("from toy import count\n\ndef test_count():\n    assert count(3) == 0\n")
    monkeypatch.setattr("entrenar.quality.mutation.verdicts.LEAST_LIMIT_S", 1)
    found = mutate(Project(toy), [TOY])
    assert statuses(found)["n -= 1 -> pass"] == "timeout"
    again: list[Verdict] = []
    mutate(Project(toy), [TOY], found, on_verdict=again.append)
    assert {verdict.status for verdict in again} == {"timeout"}


def test_a_cached_result_does_not_shield_a_mutant(toy):
    """What was computed and cached while tests were collected is computed again under the mutant."""
    (toy / "toy.py").write_text("import functools\n\n@functools.cache\ndef table():\n    return 2 * 3\n")
    (toy / "tests" / "test_toy.py").write_text(
        "import pytest\nfrom toy import table\n\n"
        "@pytest.mark.parametrize('n', [table()])\ndef test_table(n):\n    assert table() == 6\n"
    )
    assert set(statuses(mutate(Project(toy), [TOY])).values()) == {"killed"}


def test_a_cached_result_hides_no_test(toy):
    """A test that reads a table which an earlier test filled reaches it all the same, and may be the one that kills."""
    (toy / "toy.py").write_text("import functools\n\n@functools.cache\ndef table():\n    return 2 * 3\n")
    (toy / "tests" / "test_toy.py").write_text(
        "from toy import table\n\n"
        "def test_first():\n    assert table()\n\ndef test_second():\n    assert table() == 6\n"
    )
    found = mutate(Project(toy), [TOY])
    assert {(v.status, v.killed_by) for v in found} == {("killed", "tests/test_toy.py::test_second")}


def test_failing_tests_teach_nothing(toy):
    """If the unchanged code fails its tests, no mutant is tried."""
    (toy / "tests" / "test_toy.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    with pytest.raises(GateFailed, match=r"^toy: tests/test_toy\.py::test_wrong fails without any mutant"):
        mutate(Project(toy), [TOY])


def test_tests_that_cannot_be_collected_are_an_error(toy):
    """A broken test file ends the run with pytest's words."""
    (toy / "tests" / "test_toy.py").write_text("import no_such_module\n")
    with pytest.raises(GateFailed, match=r"(?s)^toy: tests/test_toy\.py cannot be collected:.*no_such_module"):
        mutate(Project(toy), [TOY])


def test_missing_files_are_named(toy):
    """A target or its tests that are not there end in an error that names them."""
    with pytest.raises(ConfigError, match=r"^gone\.py must be a Python file of .* to be mutated"):
        mutate(Project(toy), [Component("gone", ("gone.py",))])
    with pytest.raises(ConfigError, match=r"^toy: none of its tests exists: nowhere$"):
        mutate(Project(toy), [Component("toy", ("toy.py",), ("nowhere",))])


def test_sources_are_never_written(toy):
    """The tree is the same before and after, but for caches of Python."""

    def tree():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in toy.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    before = tree()
    mutate(Project(toy), [TOY])
    assert tree() == before


def test_verdicts_survive_a_file(tmp_path):
    """What is written is read back equal; each mutant stands on its own line."""
    verdicts = [
        Verdict("a.py", 3, "f", "never", "if x:", "if x", "if False", 1, "killed", "t.py::test", "assertion", "", "k"),
        Verdict("a.py", 4, "f", "never", "if y:", "if y", "if False", 1, "survived", reason="no test reaches it"),
    ]
    path = tmp_path / "results" / "mutation.json"
    write_verdicts(path, verdicts, {"mutation_score": 50.0, "files": {"a.py": {"killed": 1}}})
    assert read_verdicts(path) == verdicts
    assert json.loads(path.read_text())["files"] == {"a.py": {"killed": 1}}
    assert sum('"operator"' in line for line in path.read_text().splitlines()) == 2
    assert read_verdicts(tmp_path / "none.json") == []
    path.write_text('{"mutants": [{"line": 1}]}')
    with pytest.raises(FormatError, match="is not what `entrenar quality mutate` writes"):
        read_verdicts(path)


def test_the_package_needs_no_torch():
    """Quality works on any Python tree: neither torch nor the training half is imported."""
    code = (
        "import sys, entrenar.quality.mutation.report, entrenar.cli.quality\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'torch' or n.startswith('entrenar.train')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"


def test_new_verdicts_take_the_place_of_old_ones():
    """What an interrupted run found is put among what was known, mutant by mutant."""
    old = Verdict("a.py", 3, "f", "never", "if x:", "if x", "if False", 1, "survived")
    other = Verdict("a.py", 4, "f", "never", "if y:", "if y", "if False", 1, "killed")
    new = Verdict("a.py", 5, "f", "never", "if x:", "if x", "if False", 1, "killed")
    assert merged([old, other], [new]) == [new, other]

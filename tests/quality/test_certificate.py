"""A certificate holds what tests showed, says what was not measured, and cannot get worse unseen."""

import copy
import json

import pytest

from entrenar.cli.main import main
from entrenar.errors import FormatError, GateFailed
from entrenar.quality.certificate import NOT_MEASURED, certificates, coverage_of, demand_no_loss, mutants_of, worse
from entrenar.quality.mutation.verdicts import Verdict, write_verdicts

SHOWN = {
    "swiglu": {
        "derivation": [{"sizes": "T2 F2", "partials": 8, "seconds": 0.5}],
        "shapes": [{"case": "swiglu", "empty": True}, {"statement": "gradients have the shapes", "bound": "all"}],
        "gradcheck": [
            {"method": "complex step", "case": "a", "relative": 1e-15},
            {"method": "complex step", "case": "b", "relative": 3e-15},
            {"method": "whole Jacobian", "case": "a"},
        ],
        "error": [
            {"dtype": "torch.bfloat16", "case": "a", "roundings": 0.5, "bound": 1, "sqnr_db": 50.0},
            {"dtype": "torch.bfloat16", "case": "b", "roundings": 0.9, "bound": 2, "sqnr_db": 48.0},
            {"dtype": "float64", "against": "closed form", "relative": 2e-16},
        ],
        "property": [{"test": "t::one", "cases": 100}, {"test": "t::two", "cases": 50}],
        "controls": [{"proof": "gradcheck", "planted": "sign"}, {"proof": "gradcheck", "planted": "scale"}],
        "behavior": [{"checkpointed": "same bits", "case": "swiglu"}],
    }
}
MUTANTS = {"src/swiglu.py": {"killed": 45, "survived": 2, "without_verdict": 0, "score": 95.74}}
COVERED = {"src/swiglu.py": {"line": 100.0, "branch": 100.0}}


def certified() -> dict:
    return certificates(SHOWN, MUTANTS, COVERED, lambda op: f"src/{op}.py")


def test_a_certificate_sums_up_what_was_shown():
    """Worst errors, counts of cases, and the figures of the operation's own file."""
    certificate = certified()["swiglu"]
    assert certificate["gradcheck"] == {
        "complex step": {"cases": 2, "worst_relative": 3e-15},
        "whole Jacobian": {"cases": 1},
    }
    assert certificate["error"]["bfloat16"] == {"worst_roundings": 0.9, "bound": 2, "least_sqnr_db": 48.0}
    assert certificate["error"]["float64 against closed form"] == {"worst_relative": 2e-16}
    assert certificate["properties"] == {"count": 2, "cases": 150}
    assert certificate["wrong_backwards_refused"] == 2
    assert certificate["proved"] == [{"statement": "gradients have the shapes", "bound": "all"}]
    assert certificate["mutants"]["score"] == 95.74
    assert certificate["coverage"] == COVERED["src/swiglu.py"]


def test_what_was_not_measured_says_so():
    """No mutants and no coverage are no zeros."""
    certificate = certificates(SHOWN, {}, {}, lambda op: f"src/{op}.py")["swiglu"]
    assert certificate["mutants"] == certificate["coverage"] == NOT_MEASURED


def without(path: list, value) -> dict:
    changed = copy.deepcopy(certified())
    place = changed["swiglu"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "loss"),
    [
        (["derivation"], [], "swiglu: derivation no longer shown: "),
        (
            ["derivation"],
            [{"sizes": "T1 F1", "partials": 2}],
            'swiglu: derivation no longer shown: {"partials": 8, "sizes"',
        ),
        (["proved"], [], "swiglu: proved no longer shown: "),
        (["behavior"], [], "swiglu: behavior no longer shown: "),
        (["wrong_backwards_refused"], 1, "swiglu: wrong backwards refused fell from 2 to 1"),
        (["properties", "count"], 1, "swiglu: properties fell from 2 to 1"),
        (["properties", "cases"], 134, "swiglu: drawn cases fell from 135 to 134"),
        (["gradcheck"], {"complex step": {"cases": 2}}, "swiglu: cases of whole Jacobian fell from 1 to 0"),
        (["gradcheck", "complex step", "cases"], 1, "swiglu: cases of complex step fell from 2 to 1"),
        (["error"], {"bfloat16": {"bound": 2}}, "swiglu: error in float64 against closed form no longer shown"),
        (["error", "bfloat16", "bound"], 1000, "swiglu: bound of the error in bfloat16 rose from 2 to 1000"),
        (["mutants", "score"], 95.2, "swiglu: mutants, score fell from 95.74 to 95.2"),
        (["mutants"], NOT_MEASURED, "swiglu: mutants no longer measured"),
        (["coverage", "branch"], 99.9, "swiglu: coverage, branch fell from 100 to 99.9"),
        (["coverage"], NOT_MEASURED, "swiglu: coverage no longer measured"),
    ],
)
def test_each_loss_is_seen(path, value, loss):
    """Whatever no longer holds is named."""
    losses = worse(certified(), without(path, value))
    assert len(losses) == 1
    assert losses[0].startswith(loss)


def test_figures_of_a_machine_are_not_compared():
    """Another time, another rounding, a mutant more or less: no loss. Nor is a gain."""
    assert worse(certified(), without(["derivation"], [{"sizes": "T2 F2", "partials": 8, "seconds": 9.0}])) == []
    assert worse(certified(), without(["error", "bfloat16", "worst_roundings"], 1.5)) == []
    assert worse(certified(), without(["mutants", "score"], 95.4)) == []
    assert worse(certified(), without(["properties", "count"], 7)) == []
    assert worse(certified(), without(["properties", "cases"], 136)) == []
    assert worse(without(["mutants"], NOT_MEASURED), certified()) == []


def test_an_operation_that_is_gone_is_a_loss():
    """Its tests were deleted."""
    assert worse(certified(), {}) == ["swiglu: no test shows anything of it any more"]


def test_the_committed_certificates_are_the_measure(tmp_path):
    """Equal passes; a loss fails with its name; a missing or broken file is no pass."""
    path = tmp_path / "certificates.json"
    path.write_text(json.dumps({"operations": certified()}))
    demand_no_loss(path, certified())
    with pytest.raises(GateFailed, match=r"swiglu: properties fell from 2 to 0\nfix it, or write new certificates"):
        demand_no_loss(path, without(["properties", "count"], 0))
    for text in ("{}", "nonsense", '{"operations": {"swiglu": 3}}'):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"holds no certificates .* write them by `make certificates`"):
            demand_no_loss(path, certified())
    with pytest.raises(FormatError, match="holds no certificates"):
        demand_no_loss(tmp_path / "none.json", certified())


def test_mutants_and_coverage_come_from_their_files(tmp_path):
    """Counts by file; nothing where nothing was measured."""
    verdict = Verdict("a.py", 1, "f", "never", "if x:", "if x", "if False", 1, "killed", "t::t", "assertion")
    write_verdicts(tmp_path / "mutation.json", [verdict], {"killed": 1})
    found = mutants_of(tmp_path / "mutation.json")
    assert found == {"a.py": {"killed": 1, "survived": 0, "without_verdict": 0, "score": 100.0}}
    counts = {"num_statements": 8, "covered_lines": 6, "num_branches": 4, "covered_branches": 1}
    (tmp_path / "coverage.json").write_text(
        json.dumps({"meta": {"branch_coverage": True}, "files": {"a.py": {"summary": counts}}})
    )
    assert coverage_of(tmp_path / "coverage.json") == {"a.py": {"line": 75.0, "branch": 25.0}}
    assert mutants_of(tmp_path / "none.json") == coverage_of(tmp_path / "none.json") == {}


CONFTEST = f"""
import json

SHOWN = {SHOWN!r}

def pytest_addoption(parser):
    parser.addoption("--certificate")

def pytest_sessionfinish(session):
    with open(session.config.getoption("--certificate"), "w") as file:
        json.dump(SHOWN, file)
"""


@pytest.fixture
def checkout(toy):
    (toy / "tests" / "ops").mkdir()
    (toy / "tests" / "ops" / "test_swiglu.py").write_text("def test_it():\n    assert 1\n")
    (toy / "tests" / "conftest.py").write_text(CONFTEST)
    return toy


def test_the_command_prints_writes_and_compares(checkout, capsys):
    """Text or JSON; the file it writes is the one it compares with."""
    committed = checkout / "certificates.json"
    assert main(["verify", "ops", "--project", str(checkout), "--out", str(committed)]) == 0
    said = capsys.readouterr().out
    assert "derivation proved      8 partial derivatives at T2 F2" in said
    assert "error in bfloat16      0.90 roundings (bound 2), 48 dB" in said
    assert "properties             2 held in 150 cases" in said
    assert "mutants                not measured" in said
    assert main(["verify", "ops", "--project", str(checkout), "--json", "--against", str(committed)]) == 0
    assert json.loads(capsys.readouterr().out)["operations"]["swiglu"]["wrong_backwards_refused"] == 2
    (checkout / "tests" / "conftest.py").write_text(CONFTEST.replace("'partials': 8", "'partials': 4"))
    assert main(["verify", "ops", "--project", str(checkout), "--against", str(committed)]) == 1
    assert "swiglu: derivation no longer shown" in capsys.readouterr().err


def test_failing_tests_certify_nothing(checkout, capsys):
    """No certificate comes from a run in which a test failed."""
    (checkout / "tests" / "ops" / "test_swiglu.py").write_text("def test_it():\n    assert 0\n")
    assert main(["verify", "ops", "--project", str(checkout)]) == 1
    assert "no certificate: the tests of the operations ended with 1" in capsys.readouterr().err


def test_without_a_checkout_it_says_what_to_do(tmp_path, capsys):
    """An installed package has no tests."""
    assert main(["verify", "ops", "--project", str(tmp_path)]) == 2
    assert "has no tests/ops; run in a clone of the project, or name one with --project" in capsys.readouterr().err

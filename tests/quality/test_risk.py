"""The coverage gate says no to a file below its floor, to a file that is gone, and to figures that are none."""

import json
from pathlib import Path

import pytest

from entrenar.errors import ConfigError, FormatError, GateFailed, NotMeasured
from entrenar.quality.risk import Covered, coverage_floors, demand, gradient_floors, load_risk, read_coverage

RISK = """
[whole]
line = 90
branch = 80

[[component]]
name = "core"
files = ["src/core/*.py"]
line = 100
branch = 95
critical = true

[[component]]
name = "rest"
files = ["src/rest.py"]
line = 50
"""
FULL = Covered(lines=20, covered_lines=20, branches=40, covered_branches=38)
HALF = Covered(lines=4, covered_lines=2)


@pytest.fixture
def risk(tmp_path):
    path = tmp_path / "risk.toml"
    path.write_text(RISK)
    return load_risk(path)


def test_floors_are_met_exactly_at_the_floor(risk):
    """95 % of branches is at least 95 %, and the whole is the sum of the files."""
    floors = coverage_floors(risk, {"src/core/a.py": FULL, "src/rest.py": HALF})
    assert [(f.what, f.kind, f.measured) for f in floors] == [
        ("src/core/a.py", "line", 100.0), ("src/core/a.py", "branch", 95.0), ("src/rest.py", "line", 50.0),
        ("all of it", "line", pytest.approx(2200 / 24)), ("all of it", "branch", 95.0),
    ]  # fmt: skip
    demand(floors, "write tests")


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (Covered(20, 19, 40, 40), r"^src/core/a\.py: line 95\.00 %, at least 100 % wanted\nwrite tests$"),
        (Covered(20, 20, 1000, 949), r"^src/core/a\.py: branch 94\.90 %, at least 95 % wanted\nwrite tests$"),
    ],
)
def test_a_doctored_file_fails(risk, core, message):
    """One line or a tenth of a percent less than asked is not enough, whatever the whole says."""
    with pytest.raises(GateFailed, match=message):
        demand(coverage_floors(risk, {"src/core/a.py": core}, critical_only=True), "write tests")


def test_a_whole_below_its_floor_fails(risk):
    """A large untested file that no component names is seen in the sum."""
    files = {"src/core/a.py": FULL, "src/rest.py": HALF, "src/new.py": Covered(100, 0)}
    with pytest.raises(GateFailed, match=r"all of it: line 17\.74 %, at least 90 % wanted"):
        demand(coverage_floors(risk, files), "write tests")


def test_a_file_that_was_not_measured_fails(risk):
    """A gate does not pass because its file was renamed."""
    with pytest.raises(GateFailed, match=r"^core: no coverage was measured of src/core/\*\.py; was the file moved\?$"):
        coverage_floors(risk, {"src/kernel/a.py": FULL}, critical_only=True)


def test_only_critical_components_are_asked_when_told(risk):
    """`rest` and the whole do not count then."""
    assert {f.what for f in coverage_floors(risk, {"src/core/a.py": FULL}, critical_only=True)} == {"src/core/a.py"}


def test_an_empty_file_is_covered():
    """Nothing to reach is reached."""
    assert Covered().line == Covered().branch == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[whole", r"must be TOML"),
        ("[whole]\nline = 1\nbranch = 1\n", r"at least one \[\[component\]\]"),
        ('[[component]]\nname = "a"\nfiles = ["a"]\n', r"needs \[whole\] with line and branch"),
        ('[[component]]\nname = "a"\nfiles = []\n', r"a component needs name and files .*; name or files missing$"),
        ('[[component]]\nname = "a"\nfiles = ["a"]\nlines = 3\n', r"; unknown lines$"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, message):
    """Each fault is told with what is allowed."""
    path = tmp_path / "risk.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_risk(path)


def test_a_missing_table_is_told(tmp_path):
    """Without a table nothing passes."""
    with pytest.raises(ConfigError, match=r"risk\.toml is missing"):
        load_risk(tmp_path / "risk.toml")


def test_coverage_is_read_as_coverage_writes_it(tmp_path):
    """Counts come from each file's summary."""
    path = tmp_path / "coverage.json"
    counts = {"num_statements": 4, "covered_lines": 3, "num_branches": 2, "covered_branches": 1}
    path.write_text(json.dumps({"meta": {"branch_coverage": True}, "files": {"a.py": {"summary": counts}}}))
    assert read_coverage(path) == {"a.py": Covered(4, 3, 2, 1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"meta": {"branch_coverage": false}, "files": {}}', "has no branches; measure with branch = true"),
        ('{"files": {}}', "is not what `coverage json` writes"),
        ("nonsense", "is not what `coverage json` writes"),
    ],
)
def test_figures_of_another_kind_are_refused(tmp_path, text, message):
    """Line coverage alone, or another program's file, is no measurement."""
    path = tmp_path / "coverage.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_coverage(path)
    with pytest.raises(FormatError, match="coverage was not measured; run `make coverage`"):
        read_coverage(tmp_path / "none.json")


def test_the_projects_own_table_is_sound():
    """It names files that exist, and asks of attention, LoRA and the rest what the specification asks."""
    root = Path(__file__).parents[2]
    risk = load_risk(root / "quality" / "risk.toml")
    by_name = {component.name: component for component in risk.components}
    assert all((root / file).is_file() for component in risk.components for file in component.files)
    assert (by_name["attention"].line, by_name["attention"].branch, by_name["attention"].mutation) == (100, 95, 94)
    assert by_name["LoRA"].line >= 95
    assert by_name["LoRA"].mutation >= 94
    assert by_name["NF4"].mutation >= 94
    assert by_name["feed-forward"].line >= 90
    assert by_name["embeddings and layers"].line >= 85
    assert risk.line >= 95
    assert risk.branch >= 90


LEVELLED = '[whole]\nline = 9\nbranch = 8\n[[component]]\nname = "ops"\nfiles = ["a.py"]\n'


@pytest.mark.parametrize(
    ("level", "line", "mutation"), [("very high", 100, 90), ("high", 95, 85), ("medium", 90, 80), ("low", 85, None)]
)
def test_a_level_gives_the_specification_s_floors(tmp_path, level, line, mutation):
    """Where the component names none of its own; a higher one stands, a lower one is refused."""
    path = tmp_path / "risk.toml"
    text = f'{LEVELLED}level = "{level}"\ngradcheck = ["ops"]\n'
    path.write_text(text)
    (component,) = load_risk(path).components
    assert (component.line, component.mutation) == (line, mutation)
    path.write_text(f"{text}mutation = 97\n")
    assert load_risk(path).components[0].mutation == 97
    path.write_text(f"{text}line = {line - 1}\n")
    with pytest.raises(ConfigError, match=f"ops: line must be at least {line} at level {level}, got {line - 1}"):
        load_risk(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('level = "huge"\n', "level must be one of very high, high, medium, low; got 'huge'"),
        ('level = "very high"\n', r"level very high demands gradcheck = \[its operations\]"),
    ],
)
def test_a_level_that_cannot_be_held_is_refused(tmp_path, more, message):
    """An unknown one, and the highest without a gradient check."""
    (tmp_path / "risk.toml").write_text(LEVELLED + more)
    with pytest.raises(ConfigError, match=message):
        load_risk(tmp_path / "risk.toml")


def gradients(tmp_path, certificates):
    """Return the floors of one component whose operation must be checked."""
    (tmp_path / "risk.toml").write_text(f'{LEVELLED}level = "very high"\ngradcheck = ["ops"]\n')
    if certificates is not None:
        (tmp_path / "c.json").write_text(json.dumps(certificates))
    return gradient_floors(load_risk(tmp_path / "risk.toml"), tmp_path / "c.json")


def test_the_highest_level_demands_a_gradient_check(tmp_path):
    """Cases of any method count; none fails; no certificates are not measured."""
    shown = {"operations": {"ops": {"gradcheck": {"central difference": {"cases": 2}, "complex step": {"cases": 21}}}}}
    (floor,) = gradients(tmp_path, shown)
    assert (floor.holds, floor.measured, floor.unit) == (True, 23, "cases")
    for empty in ({"operations": {"ops": {"gradcheck": {}}}}, {"operations": {"other": {}}}):
        with pytest.raises(GateFailed, match=r"ops: gradcheck 0\.00 cases, at least 1 cases wanted"):
            demand(gradients(tmp_path, empty), "check it")
    with pytest.raises(FormatError, match="holds no certificates"):
        gradients(tmp_path, [])
    (tmp_path / "c.json").unlink()
    with pytest.raises(NotMeasured, match="no gradient check was measured"):
        gradients(tmp_path, None)


def test_without_a_demand_no_certificate_is_read(tmp_path, risk):
    """Nothing is asked for."""
    assert gradient_floors(risk, tmp_path / "none.json") == []

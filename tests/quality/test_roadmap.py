"""A roadmap: tasks and criteria as the specification has them, ids that stay, commands that are not lost, verdicts."""

import json

import pytest

from entrenar.cli.main import main
from entrenar.errors import ConfigError, FormatError
from entrenar.quality.roadmap import plan, specification

SPEC = """# Title

Text with **Deliverables:** in a sentence.

## 1. First things

**Success Criteria:**
- It works
- It is
  fast

**Rationale:** because

- not a criterion

## Background

- not a task

## 3. Third things

### Phase 1: Build (weeks 1-2)

**Deliverables:**
1. `a.py` - one
2. Two

```yaml
acceptance_criteria:
  - "in a code block"
```

**Quality Gates:**
- Score \u2265 90

### Phase 2: Rest

**Implementation:** Add the `rest`.

- later

## Metrics

1. **Speed**
   - fast
   - faster
2. Plain
"""


def made(tmp_path, text=SPEC, **known):
    place = tmp_path / "spec.md"
    place.write_text(text)
    return plan.roadmap(specification.read(place), plan.Heading("spec.md", "", "X"), known)


def test_epics_phases_tasks_and_criteria_are_those_of_the_text(tmp_path):
    """Lists after labels, sentences after labels, nested lists; no code blocks, no other lists."""
    items = made(tmp_path)["roadmap"]
    assert [(item["id"], item["title"]) for item in items] == [
        ("X-001", "First things"), ("X-003", "Third things"), ("X-004", "Metrics")]  # fmt: skip


def texts(item, phase=0):
    return [row["text"] for row in item["phases"][phase]["acceptance_criteria"]]


def test_lists_belong_to_their_labels(tmp_path):
    """Criteria, tasks, and the sentence of a label; a rationale ends the list."""
    first, third, metrics = made(tmp_path)["roadmap"]
    assert texts(first) == ["It works", "It is fast"]
    assert [phase["phase"] for phase in third["phases"]] == ["Phase 1: Build (weeks 1-2)", "Phase 2: Rest"]
    assert third["phases"][0]["subtasks"] == ["`a.py` - one", "Two"]
    assert texts(third) == ["Score \u2265 90"]
    assert third["phases"][1]["subtasks"] == ["Add the `rest`.", "later"]
    assert texts(metrics) == ["Speed: fast", "Speed: faster", "Plain"]


def test_an_id_is_the_section_s_own_number(tmp_path):
    """Another section in between changes no other's id."""
    before = made(tmp_path)["roadmap"][0]
    more = SPEC.replace("## Background", "## 2. New\n\n**Tasks:**\n- new\n\n## Background")
    after = made(tmp_path, more)["roadmap"]
    assert after[0] == before
    assert after[1]["id"] == "X-002"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", FormatError, "must have sections"),
        (b"# Only a title\n\ntext\n", FormatError, "must have sections"),
        (b"## Section\n\n- a list without a label\n", FormatError, "must have sections"),
        (b"## 1. A\n\n**Tasks:** x\n\n## 1. B\n\n**Tasks:** y\n", FormatError, "number its sections differently"),
        (b"\xff\xfe", FormatError, "must be UTF-8"),
        (None, ConfigError, "is missing: a roadmap is made from"),
    ],
)
def test_a_specification_without_tasks_is_refused(tmp_path, content, error, message):
    """No headings, no labels, no text, no file."""
    place = tmp_path / "spec.md"
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(error, match=message):
        specification.read(place)


def test_commands_follow_their_criteria(tmp_path):
    """By id and words; what the specification no longer says is refused."""
    item = made(tmp_path, **{"X-001-P1-C1": ("It works", "true")})["roadmap"][0]
    assert item["phases"][0]["acceptance_criteria"][0]["verify"] == "true"
    with pytest.raises(ConfigError, match="'It works' in the specification, 'It worked' where its command stands"):
        made(tmp_path, **{"X-001-P1-C1": ("It worked", "true")})
    with pytest.raises(ConfigError, match="no criterion X-009-P1-C1"):
        made(tmp_path, **{"X-009-P1-C1": ("It works", "true")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "must be TOML"),
        ('[[criterion]]\nid = "a"\ntext = "b"', "text and verify, and nothing else"),
        ('[[criterion]]\nid = "a"\ntext = "b"\nverify = "say \'hi"', "balanced quotes"),
        ('[[criterion]]\nid = "a"\ntext = "b"\nverify = "true"\n' * 2, "an id of its own"),
    ],
)
def test_bad_commands_are_refused(tmp_path, text, message):
    """Before a roadmap is made."""
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan.commands(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="is missing"):
        plan.commands(tmp_path / "none.toml")


COMMANDS = """
[[criterion]]
id = "X-001-P1-C1"
text = "It works"
verify = "{}"
[[criterion]]
id = "X-001-P1-C2"
text = "It is fast"
verify = "true"
"""


@pytest.mark.parametrize(
    ("only", "verify", "code"), [("X-001", "true", 0), ("X-001", "false", 1), ("X-001", "nothing", 5), ("X", "true", 5)]
)
def test_a_roadmap_is_checked_by_its_commands(tmp_path, capsys, only, verify, code):
    """Passed, failed, not measured; a criterion without a command is not measured, and so is a missing program."""
    (tmp_path / "spec.md").write_text(SPEC.replace("## Metrics", "## 4. Metrics"))
    (tmp_path / "c.toml").write_text(COMMANDS.format(verify))
    road = str(tmp_path / "r.yaml")
    words = ["--spec", str(tmp_path / "spec.md"), "--commands", str(tmp_path / "c.toml"), "--prefix", "X"]
    assert main(["quality", "roadmap", *words, "--output", road]) == 0
    first = (tmp_path / "r.yaml").read_bytes()
    assert main(["quality", "roadmap", *words, "--output", road]) == 0
    assert (tmp_path / "r.yaml").read_bytes() == first
    capsys.readouterr()
    assert main(["quality", "roadmap", "--check", road, "--only", only, "--format", "json"]) == code
    table = json.loads(capsys.readouterr().out.partition("\n2 passed")[0])
    assert sum(table["counts"].values()) == len(table["criteria"])
    assert main(["quality", "roadmap", "--check", road, "--only", "Y"]) == 2


@pytest.mark.parametrize(
    "text", ["", "x: [", "roadmap_version: '2.0'\nroadmap: []", "roadmap_version: '1.0'\nroadmap: []", "- 1",
             "roadmap_version: '1.0'\nroadmap: [{phases: [{acceptance_criteria: [{id: 1}]}]}]", "!!python/object:x {}"]
)  # fmt: skip
def test_a_damaged_roadmap_is_refused(tmp_path, text):
    """Another version, no criteria, no YAML, no code in it."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FormatError, match="is no roadmap"):
        plan.load(tmp_path / "r.yaml")


def test_a_missing_roadmap_is_refused(tmp_path):
    """With the command that makes it."""
    with pytest.raises(ConfigError, match="entrenar quality roadmap --spec"):
        plan.load(tmp_path / "r.yaml")

"""This repository's own gates, roadmap, hooks and prompts: every command they name exists, and each file is current."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from entrenar.cli.main import COMMANDS
from entrenar.cli.quality import VERBS
from entrenar.quality import gate
from entrenar.quality.debt import rules
from entrenar.quality.prompts.library import fill, library
from entrenar.quality.roadmap import plan, specification

ROOT = Path(__file__).parents[2]
ROADMAP = ROOT / "docs" / "roadmaps" / "llama-integration.yaml"
COMMANDS_FILE = ROADMAP.with_suffix(".toml")
PROGRAMS = {"ruff", "mypy", "coverage", "diff-cover", "git", "pre-commit", "jq", "pytest"}


def fault(command):
    """Return what a command names that does not exist, or None."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    paths = [word for word in rest if re.match(r"(src|tests|benchmarks|docs|configs|examples|quality|fuzz)/", word)]
    missing = [path for path in paths if not (ROOT / path.partition("::")[0]).exists() and "*" not in path]
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        known = {name for names in targets for name in names.split()}
        return next((word for word in rest if word not in known and "=" not in word), None)
    if program == "entrenar":
        if not rest or rest[0] not in COMMANDS:
            return command
        verb = next((word for word in rest[1:] if not word.startswith("-")), None)
        if rest[0] == "quality" and verb not in VERBS:
            return f"quality {verb}"
        known = {one.name for one in gate.load(ROOT / gate.GATES_FILE)}
        if rest[:2] == ["quality", "gate"] and (
            odd := {word for word in rest[2:] if word[0] != "-" and not word.isdigit()} - known
        ):
            return f"gate {odd.pop()}"
        return None if "figure" in rest else next(iter(missing), None)
    if program == "python":
        return next(iter(missing), None)
    return None if program in PROGRAMS else program


def test_a_command_that_does_not_exist_is_seen():
    """The check below can fail."""
    wrong = ("make nothing", "entrenar nothing", "entrenar quality nothing", "python tests/none.py", "cargo test",
             "entrenar quality gate nothing")  # fmt: skip
    assert all(fault(command) for command in wrong)


@pytest.mark.parametrize("one", gate.load(ROOT / gate.GATES_FILE), ids=lambda one: one.name)
def test_the_gates_commands_exist(one):
    """What is run."""
    assert fault(one.run) is None


@pytest.mark.parametrize("one", plan.load(ROADMAP), ids=lambda one: one.id)
def test_every_criterion_has_a_command_that_exists(one):
    """No criterion of the specification is without one."""
    assert one.verify is not None
    assert fault(one.verify) is None


def test_the_roadmap_is_the_specification_s():
    """Made again it is the committed file, byte for byte."""
    heading = plan.Heading("docs/specifications/llama-integration.md", "paiml/entrenar", "ENT-LLAMA")
    epics = specification.read(ROOT / heading.specification)
    made = plan.dump(plan.roadmap(epics, heading, plan.commands(COMMANDS_FILE)))
    assert ROADMAP.read_text(encoding="utf-8") == made, "run `make roadmap`"


def test_every_phase_of_the_specification_has_gates():
    """p1 to p4 of `make gate-pN`, and each tier."""
    gates = gate.load(ROOT / gate.GATES_FILE)
    assert {phase for one in gates for phase in one.phases} == set(gate.PHASES)
    assert {tier for one in gates for tier in one.tiers} == set(gate.TIERS)


def test_the_hooks_run_what_exists():
    """Each entry is a program of the project's own environment."""
    table = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in table["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == {"lint", "format", "debt", "regression"}
    assert all(fault(hook["entry"]) is None for hook in hooks)


def test_llama_s_code_is_held_to_an_a():
    """The specification's rule, on files that exist."""
    found = rules.load(ROOT)
    assert (found.named["llama"], found.min_grade, found.min_mean_score) == ("A", "A-", 95)
    assert all(any(ROOT.glob(pattern)) for pattern in found.paths["llama"])


def test_llama_s_grade_is_in_the_specification_s_own_file():
    """`.pmat/tdg-rules.toml` has `llama_min_grade`."""
    assert tomllib.loads((ROOT / rules.RULES_FILE).read_text())["llama_min_grade"] == "A"


@pytest.mark.parametrize("one", library(ROOT).values(), ids=lambda one: one.name)
def test_every_command_of_a_prompt_exists(one):
    """Filled in with values that exist here, each line that begins with `$` can be run."""
    file = "src/entrenar/stats.py"
    examples = {"TARGET_FILE": file, "TARGET": file, "COMMAND": "entrenar doctor"}
    given = {key: examples.get(key, "something") for key, value in one.variables.items() if value is None}
    text = fill(one, given, ROOT)
    found = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    assert found
    assert [line for line in found if fault(line) is not None] == []


def test_llama_has_at_least_eight_prompts_of_its_own():
    """In the file that the specification names."""
    table = yaml.safe_load((ROOT / "prompts" / "llama-development.yaml").read_text())
    assert len([row for row in table["prompts"] if row["name"].startswith("llama-")]) >= 8


def test_every_plant_of_a_gate_finds_the_text_that_it_replaces():
    """A plant that no longer matches would stop the self-test of all gates, which nobody runs at each commit."""
    plants = [plant for one in gate.load(ROOT / "quality" / "gates.toml") for plant in one.plants if plant.old]
    assert len(plants) > 3
    for plant in plants:
        assert plant.old in (ROOT / plant.file).read_text(encoding="utf-8"), plant

"""The tiers exist where they are named, and none of them can fail unseen."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "examples" / "llama2" / "Makefile").read_text(encoding="utf-8")
CALLERS = [ROOT / ".ci" / "run", *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.MULTILINE))


def called(text: str) -> set[str]:
    """The targets of every `make …` in a script, without its variables."""
    lines = re.findall(r"(?:^|[;&:-]\s|then )\s*make ([^;#\n]+)", text, flags=re.MULTILINE)
    return {word for line in lines for word in re.sub(r"\w+=(\"[^\"]*\"|\$\{\{.*?\}\}|\S+)", "", line).split()}


def swallowed(text: str) -> list[str]:
    """Ways to go on after a failure."""
    return re.findall(r"\|\|\s*(?:true|:|exit 0)|continue-on-error|set \+e|^\t-|^\t@-", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", CALLERS, ids=lambda path: path.name)
def test_what_is_called_exists(path):
    """Every target that CI calls is a target of the Makefile."""
    found = called(path.read_text(encoding="utf-8"))
    assert found
    assert found <= targets(MAKEFILE)


def test_continuous_integration_runs_the_readmes_test_command():
    """`make test`, lint, types, the gates on coverage, certificates and mutants, and the fuzz controls."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert called(script) >= {
        "lint",
        "types",
        "test",
        "coverage-gate",
        "fuzz-smoke",
        "certificates-check",
        "mutation-smoke",
    }
    assert "set -euo pipefail" in script


def test_the_nightly_runs_tier_three():
    """Each part of tier 3 is a step of its own."""
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    parts = re.search(r"^tier3: ([^#]+)##", MAKEFILE, flags=re.MULTILINE)
    assert parts is not None
    assert set(parts[1].split()) <= called(nightly)
    assert set(parts[1].split()) <= targets(MAKEFILE)


def test_the_examples_have_the_tiers_of_the_root():
    """examples/llama2 names no target that the root does not have, and has the three tiers."""
    named = set(re.search(r"^TIERS := (.+)$", EXAMPLES, flags=re.MULTILINE)[1].split())
    assert {"tier1", "tier2", "tier3", "coverage-critical", "mutation-llama"} <= named <= targets(MAKEFILE)


def test_the_counted_properties_are_there():
    """Each row of the kept counts names a property, so a renamed one does not count twice."""
    rows = json.loads((ROOT / "quality" / "results" / "properties.json").read_text(encoding="utf-8"))
    for name in rows["properties"]:
        path, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), name
    assert rows["count"] == len(rows["properties"]) >= 40
    assert rows["cases"] == sum(row["cases"] for row in rows["properties"].values())


@pytest.mark.parametrize(
    "path",
    [*CALLERS, ROOT / "Makefile", ROOT / "examples/llama2/Makefile"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_failure_is_swallowed(path):
    """No `|| true`, and nothing that means the same."""
    assert swallowed(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["make x || true", "make x ||:", "\t-rm y", "  continue-on-error: true", "set +e"])
def test_a_swallowed_failure_is_seen(line):
    """The check above sees each way."""
    assert swallowed(f"a\n{line}\nb")

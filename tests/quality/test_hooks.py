"""The hooks of this repository refuse a bad commit and let a good one pass."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pre_commit")

ROOT = Path(__file__).parents[2]
GOOD = '"""Good."""\n\n\ndef double(x: int) -> int:\n    """Give twice."""\n    return 2 * x\n'
TANGLE = "    for i in x:\n        for j in i:\n            for k in j:\n                k = k and i or j and x or k\n"
WORSE = GOOD + '\n\ndef worse(x: list) -> None:\n    """Tangle."""\n' + TANGLE * 6


def run(folder, *words, code=0):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    words = [*(["git", *identity] if words[0] == "git" else words[:1]), *words[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_bad_commit_is_refused(tmp_path):
    """This repository's own configuration, in another one: debt and format are seen, and nothing else is committed."""
    programs = f"{Path(sys.executable).parent}/"
    hooks = (ROOT / ".pre-commit-config.yaml").read_text().replace(".venv/bin/", programs)
    (tmp_path / ".pre-commit-config.yaml").write_text(hooks)
    (tmp_path / "pyproject.toml").write_text('[tool.entrenar.quality]\nmin_grade = "A-"\n')
    (tmp_path / "good.py").write_text(GOOD)
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, f"{programs}entrenar", "quality", "baseline", "create")
    run(tmp_path, f"{programs}pre-commit", "install")
    run(tmp_path, "git", "add", ".")
    run(tmp_path, "git", "commit", "-qm", "good")
    (tmp_path / "worse.py").write_text(WORSE)
    run(tmp_path, "git", "add", ".")
    said = run(tmp_path, "git", "commit", "-qm", "worse", code=1)
    assert "FAIL worse.py" in said
    assert "technical debt, baseline" in said
    (tmp_path / "worse.py").write_text("x = [1,2]\n")
    run(tmp_path, "git", "add", ".")
    assert "would be reformatted" in run(tmp_path, "git", "commit", "-qm", "format", code=1)
    assert run(tmp_path, "git", "log", "--format=%s") == "good\n"

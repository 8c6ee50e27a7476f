"""What installs the program names files that are there, and the CPU build of torch where a CPU is meant.

`make wheel-check` builds wheel and sdist and trains from a clean environment; it needs the network, so it is no test.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def test_the_dockerfile_copies_what_is_there_and_not_ignored():
    """Every copied path exists, and the ignore file lets it through."""
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert copied
    assert [name for name in copied if not (ROOT / name).exists() or f"!{name}" not in let_through] == []


def test_the_cpu_variant_takes_the_cpu_build_and_the_other_does_not():
    """Both variants install from the constraints; the last stage, which a plain build makes, is the CPU's."""
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    assert list(stages) == ["source", "cuda", "cpu"]
    assert CPU_INDEX in stages["cpu"]
    assert CPU_INDEX not in stages["cuda"]
    assert all("--constraint constraints.txt" in stages[name] for name in ("cuda", "cpu"))


def test_every_way_to_install_in_readme_names_the_cpu_index():
    """pip, pipx and uv would download the CUDA build by default."""
    lines = re.findall(r"^\$ ((?:pip|pipx|uv) .+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"pip", "pipx", "uv"}
    assert [line for line in lines if CPU_INDEX not in line] == []


def test_the_wheel_check_can_be_run():
    """The script of `make wheel-check` is executable, stops at a failure, and trains outside the repository."""
    script = ROOT / "scripts" / "wheel_check.sh"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index('cd "$place/elsewhere"') < text.index("quickstart --minutes 0.1")

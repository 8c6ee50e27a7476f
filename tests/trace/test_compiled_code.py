"""Kernels of torch.compile lead back to the lines of the model."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.errors import FormatError
from entrenar.trace.compiled_code import CODE, NODES, compiled_map, kernel_calls
from entrenar.trace.records import Frame

# What torch 2.13 wrote for the two graphs of the model below, on a CPU, with TORCH_COMPILE_DEBUG=1.
RECORDED = Path(__file__).parent / "data" / "compiled_graphs.json"
MODEL = """import torch
class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate=torch.nn.Linear(64,128,bias=False); self.up=torch.nn.Linear(64,128,bias=False); self.down=torch.nn.Linear(128,64,bias=False)
    def forward(self, x):
        gate = torch.nn.functional.silu(self.gate(x))
        hidden = gate * self.up(x)
        return self.down(hidden) + x
"""  # noqa: E501 - the lines are those of the recording


@pytest.fixture
def folder(tmp_path) -> Path:
    for graph, files in json.loads(RECORDED.read_text()).items():
        (tmp_path / graph).mkdir()
        for name, lines in files.items():
            (tmp_path / graph / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def lines_of(graph: Path) -> list[tuple[str, list[int]]]:
    return [(call.kernel, [origin.line for origin in call.origins]) for call in kernel_calls(graph)]


def test_every_kernel_of_the_forward_has_its_lines(folder):
    """By the table of nodes: three products and the fused SwiGLU."""
    assert lines_of(folder / "forward") == [
        ("extern_kernels.mm", [7]),
        ("extern_kernels.mm", [8]),
        ("cpp_fused_mul_silu_0", [7, 8]),
        ("extern_kernels.addmm", [9]),
    ]


def test_every_kernel_of_the_backward_has_its_lines(folder):
    """By the comments; the fused kernel, which has none, by the kernels that read its results."""
    assert not (folder / "backward" / NODES).exists()
    assert lines_of(folder / "backward") == [
        ("extern_kernels.mm", [9]),
        ("extern_kernels.mm", [9]),
        ("cpp_fused_mul_silu_silu_backward_0", [7, 8]),
        ("extern_kernels.mm", [8]),
        ("extern_kernels.mm", [7, 8]),
    ]


def test_a_frame_in_a_cached_copy_is_moved_to_the_model(folder, tmp_path):
    """Inductor runs a copy under a name of its own; it is known by its content, and keeps its place."""
    copy = tmp_path / "cgq4.py"
    shutil.copy(folder / "forward" / CODE, copy)
    number = next(index for index, text in enumerate(copy.read_text().splitlines(), 1) if "mul_silu_0(buf" in text)
    frame = compiled_map(folder).move(Frame("call", str(copy), number))
    assert (frame.file, frame.line, frame.function) == ("model.py", 7, "forward")
    assert frame.generated == f"{copy}:{number}"
    note = compiled_map(folder).origin(str(copy), number).note
    assert note == "cpp_fused_mul_silu_0 computes model.py:7, model.py:8"


def test_code_behind_the_last_kernel_is_nobodys(folder):
    """The benchmark that Inductor appends does not count as the model."""
    maps = compiled_map(folder)
    code = folder / "forward" / CODE
    end = next(index for index, text in enumerate(code.read_text().splitlines(), 1) if "benchmark_compiled" in text)
    assert maps.origin(str(code), end) is None


def test_a_kernel_can_be_looked_up_by_name(folder):
    """A profiler knows the kernel's name only."""
    assert compiled_map(folder).functions["cpp_fused_mul_silu_0"] == "[model.py:7 in forward]"


def test_a_folder_without_compiled_code_is_refused(folder, tmp_path):
    """The remedy names the variable to set."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="TORCH_COMPILE_DEBUG=1"):
        compiled_map(tmp_path / "empty")
    (folder / "forward" / NODES).write_text("[]")
    with pytest.raises(FormatError, match="cppCodeToPost must be an object"):
        compiled_map(folder)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None or shutil.which("g++") is None, reason="needs torch, g++")
def test_a_model_compiled_now_leads_back_to_its_lines(tmp_path):
    """The recording is not out of date: each product and each fused kernel of both graphs has its line."""
    (tmp_path / "model.py").write_text(MODEL)
    program = "import torch, model; y = torch.compile(model.MLP())(torch.randn(8, 64)); y.sum().backward()"
    variables = {"TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(tmp_path / "debug"),
                 "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | variables, check=True, capture_output=True
    )
    graphs = sorted((tmp_path / "debug").rglob(CODE))
    assert len(graphs) == 2
    calls = [call for graph in graphs for call in kernel_calls(graph.parent)]
    assert {origin.line for call in calls for origin in call.origins} == {7, 8, 9}
    called = sum(
        len(re.findall(r"^ +(?:cpp_fused|extern_kernels\.)\w+\(", g.read_text(), re.MULTILINE)) for g in graphs
    )
    assert len(calls) == called
    maps = compiled_map(tmp_path / "debug")
    cached = [path for path in (tmp_path / "cache").rglob("*.py") if path.parent.suffix != ".debug"]
    moved = [maps.origin(str(path), call.line) for path in cached for call in calls]
    assert any(origin is not None and origin.file == str(tmp_path / "model.py") for origin in moved)

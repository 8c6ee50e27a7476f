"""Activations that wait elsewhere come back as they went, once each, and what cannot hold them says so."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from train_toy import fingerprint, in_child, run_toy

from entrenar.errors import ConfigError, DiskFullError, MachineError
from entrenar.train import offload
from entrenar.train.offload import ActivationFile, ActivationStore, open_store
from entrenar.train.settings import TrainConfig

ROWS, WIDTH, LAYERS = 2048, 256, 12
STATE_BYTES = 4 * ROWS * WIDTH


class Tower(nn.Module):
    """Layers whose activations are far larger than their weights."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self._layer, layer, x, use_reentrant=False) if self.recompute else self._layer(layer, x)
        return x

    @staticmethod
    def _layer(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(layer(x))


def _input() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def _gradients(module: nn.Module, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    module.zero_grad()
    loss(_input()).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def _store(module: nn.Module, folder: Path | None, budget_bytes: int = 10**9) -> ActivationStore:
    return ActivationStore(module, None if folder is None else ActivationFile(folder, budget_bytes))


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_same_bit_for_bit(tmp_path: Path, place: str, *, recompute: bool) -> None:
    """Activations elsewhere give the gradients of activations kept, three steps long, recomputed or not."""
    module = Tower(recompute=recompute)

    def plain(x: Tensor) -> Tensor:
        return module(x).square().sum()

    expected = _gradients(module, plain)
    store = _store(module, tmp_path if place == "disk" else None)
    loss = store.around(plain)
    for _ in range(3):
        for mine, other in zip(_gradients(module, loss), expected, strict=True):
            assert torch.equal(mine, other)
    store.close()
    assert store.most_bytes > (LAYERS - 1) * STATE_BYTES


def test_what_is_saved_several_times_is_stored_once_and_weights_never(tmp_path: Path) -> None:
    """The output of tanh, which tanh and the next layer save, takes its size once, in every step at the same place."""
    module = Tower()
    store = _store(module, tmp_path)
    loss = store.around(lambda x: module(x).sum())
    for _ in range(3):
        _gradients(module, loss)
        assert store.most_bytes == (LAYERS + 1) * STATE_BYTES  # the input, and one state a layer
    store.close()


def test_a_tape_that_lives_keeps_its_place(tmp_path: Path) -> None:
    """Two forwards before two backwards, and a backward that is done twice, read what they wrote."""
    module = Tower()
    store = _store(module, tmp_path)
    loss = store.around(lambda x: module(x).sum())
    expected = [2 * gradient for gradient in _gradients(module, lambda x: module(x).sum())]
    module.zero_grad()
    one, two = loss(_input()), loss(-_input())
    one.backward(retain_graph=True)
    one.backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    two.backward()
    store.close()


def test_the_peak_falls(tmp_path: Path) -> None:
    """With a window of one state, five of the twelve layers' activations are in memory together at most.

    In the backward: the one in use and the two gradients around it, one read ahead and one that is being read.
    """
    script = _PEAKS.format(path=sys.path, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    away, kept = (int(word) for word in done.stdout.split())
    assert kept > (LAYERS - 1) * STATE_BYTES
    assert away < kept - (LAYERS - 5) * STATE_BYTES


_PEAKS = """
import sys
from pathlib import Path
sys.path[:] = {path!r}
import torch
torch.set_num_threads(1)
from entrenar.train import offload, return_freed_blocks
from test_offload import STATE_BYTES, Tower, _input, _store
return_freed_blocks()
offload.BEHIND_BYTES = offload._AHEAD_BYTES = STATE_BYTES
module, x = Tower(), _input()

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def loss(x):
    return module(x).sum()

loss(x[:512]).backward()
for way in (_store(module, Path({folder!r})).around(loss), loss):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; see proc(5)
    before = status("VmRSS")
    way(x).backward()
    print(status("VmHWM") - before)
"""


def test_a_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and losses of a run with its activations on disk are those of one without."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    run_toy(tmp_path / "kept", grad_accum_steps=2)
    run_toy(tmp_path / "away", grad_accum_steps=2, offload="disk")
    assert fingerprint(tmp_path / "away") == fingerprint(tmp_path / "kept")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """The file has no name, even while it is in use."""
    module = Tower()
    store = _store(module, tmp_path / "new")
    loss = store.around(lambda x: module(x).sum())(_input())
    assert list((tmp_path / "new").iterdir()) == []
    loss.backward()
    store.close()


def test_a_budget_that_is_too_small_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    """What does not fit says how much there is and what would help."""
    module = Tower()
    store = _store(module, tmp_path, 3 * STATE_BYTES)
    with pytest.raises(DiskFullError, match=r"offload_budget_gb = 0\.00629146, .* 0\.00839 GB of them; raise it, set"):
        store.around(lambda x: module(x).sum())(_input())
    store.close()


def test_a_full_disk_is_an_error_with_the_place(tmp_path: Path) -> None:
    """A file that may not grow is reported as a lack of space."""
    module = Tower()

    def step() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (STATE_BYTES, STATE_BYTES))
        with pytest.raises(DiskFullError, match=f"no space left to write {tmp_path}"):
            _store(module, tmp_path).around(lambda x: module(x).sum())(_input())
        os._exit(0)

    assert in_child(step) == 0


def test_a_file_that_lost_its_end_is_an_error(tmp_path: Path) -> None:
    """Reading past the end of the file says where it ends."""
    file = ActivationFile(tmp_path, 1000)
    file.reserve(10)
    file.write(torch.arange(4, dtype=torch.uint8).untyped_storage(), 6)
    assert list(file.read(6, 4)) == [0, 1, 2, 3]
    with pytest.raises(MachineError, match=r"file of activations in .* ends at byte"):
        file.read(6, offload._GROWTH_BYTES)
    file.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "host"}, "offload = host needs a GPU: .* set it to disk"),
        ({"offload": "disk", "compile": True}, "train.offload and train.compile cannot be combined"),
    ],
)
def test_senseless_settings_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Host memory for a CPU, and hooks within a compiled model, are refused."""
    with pytest.raises(ConfigError, match=message):
        open_store(Tower(), TrainConfig.model_validate({"max_steps": 1} | options), tmp_path)


def test_no_store_is_opened_without_need(tmp_path: Path) -> None:
    """By default activations stay, and no file is made."""
    assert open_store(Tower(), TrainConfig(max_steps=1), tmp_path) is None
    elsewhere = TrainConfig(max_steps=1, offload="disk", offload_dir=tmp_path / "elsewhere")
    store = open_store(Tower(), elsewhere, tmp_path)
    assert store is not None
    store.close()
    assert (tmp_path / "elsewhere").is_dir()

"""Our optimizer moves the weights exactly as torch's own does, in both precisions, and loses no bit of its state."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from entrenar.errors import CheckpointError, ConfigError
from entrenar.train.optim import OptimConfig, Optimizer, build_optimizer, orthogonalized
from entrenar.train.precision import join_master

STEPS = 5
SCALE = 0.25


def _module() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(300, 600), nn.LayerNorm(600), nn.Linear(600, 7))


def _gradients(module: nn.Module, step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(dtype) for p in module.parameters()]


def _oracle(module: nn.Module, config: OptimConfig, dtype: torch.dtype) -> None:
    """Train float32 `module` with torch's AdamW on gradients that were rounded to `dtype`."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for step in range(STEPS):
        for group in torchs.param_groups:
            group["lr"] = config.lr / (step + 1)
        for parameter, gradient in zip(module.parameters(), _gradients(module, step, dtype), strict=True):
            parameter.grad = gradient.float() * SCALE
        torchs.step()


def _train(module: nn.Module, optimizer: Optimizer, config: OptimConfig, dtype: torch.dtype) -> None:
    for step in range(STEPS):
        for parameter, gradient in zip(module.parameters(), _gradients(module, step, dtype), strict=True):
            parameter.grad = gradient
        optimizer.step(config.lr / (step + 1), SCALE)


def _masters(module: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    state, masters = optimizer.state_dict(), []
    for name, weight in module.named_parameters():
        bits, scratch = (torch.empty_like(weight, dtype=torch.int32) for _ in range(2))
        is_split = weight.dtype == torch.bfloat16
        masters.append(join_master(weight.data, state[f"{name}.remainder"], bits, scratch) if is_split else weight)
    return masters


def test_float32_equals_torchs_fused_adamw() -> None:
    """Weights longer than a chunk and shorter ones are bit for bit those of torch.optim.AdamW with decay groups."""
    config = OptimConfig(lr=1e-2, weight_decay=0.3)
    ours, theirs = _module(), _module()
    _train(ours, build_optimizer(ours.named_parameters(), config), config, torch.float32)
    _oracle(theirs, config, torch.float32)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_bfloat16_masters_equal_torchs_fused_adamw_in_float32() -> None:
    """With bfloat16 weights the masters are bit for bit a float32 run on the same gradients."""
    config = OptimConfig(lr=1e-2, weight_decay=0.3)
    ours, theirs = _module(), _module()
    optimizer = build_optimizer(ours.named_parameters(), config, "bfloat16")
    _train(ours, optimizer, config, torch.bfloat16)
    _oracle(theirs, config, torch.bfloat16)
    for mine, other in zip(_masters(ours, optimizer), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_updates_below_bfloat16s_resolution_are_kept() -> None:
    """A hundred steps of 2^-12 move a bfloat16 weight of 1, which no single one of them could."""
    weight = nn.Parameter(torch.ones(4))
    config = OptimConfig(weight_decay=0.0, eps=1e-12)
    optimizer = build_optimizer([("w", weight)], config, "bfloat16")
    for _ in range(100):
        weight.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step(2.0**-12, 1.0)
    assert torch.allclose(weight.float(), torch.full((4,), 1 - 100 * 2.0**-12), atol=2.0**-9, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_equals_torchs_and_leaves_the_rest_to_adamw(precision: str) -> None:
    """Hidden matrices move as under torch.optim.Muon, excluded matrices and vectors as under AdamW."""
    config = OptimConfig(optimizer="muon", lr=1e-2, weight_decay=0.3, muon_excluded=("2",))
    dtype = getattr(torch, precision)
    ours, theirs = _module(), _module()
    optimizer = build_optimizer(ours.named_parameters(), config, precision)
    _train(ours, optimizer, config, dtype)
    _oracle(theirs, config, dtype)  # all AdamW; the matrix of layer 0 is then redone with Muon
    matrix = nn.Parameter(_module()[0].weight.data)
    muon = torch.optim.Muon([matrix], lr=1.0, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        muon.param_groups[0]["lr"] = config.lr / (step + 1)
        matrix.grad = _gradients(ours, step, dtype)[0].float() * SCALE
        muon.step()
    expected = [matrix, *list(theirs.parameters())[1:]]
    for mine, other in zip(_masters(ours, optimizer), expected, strict=True):
        assert torch.equal(mine, other)
    assert "0.weight.squares" not in optimizer.state_dict()
    assert "2.weight.squares" in optimizer.state_dict()


def test_matrices_decay_and_vectors_do_not() -> None:
    """With a zero gradient a matrix shrinks by lr * weight_decay, a vector stays."""
    module = nn.Linear(3, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    optimizer = build_optimizer(module.named_parameters(), OptimConfig(weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1, 1.0)
    assert torch.allclose(module.weight, torch.full((2, 3), 0.95))
    assert torch.equal(module.bias, torch.ones(2))


def test_a_tied_parameter_is_trained_once_under_its_first_name() -> None:
    """Two names of one parameter have one state and are moved once."""
    tied = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([("embed", tied), ("head", tied)], OptimConfig(weight_decay=0.0))
    assert sorted(optimizer.state_dict()) == ["embed.mean", "embed.squares", "step"]
    tied.grad = torch.ones(2, 2)
    optimizer.step(0.1, 1.0)
    assert torch.allclose(tied, torch.full((2, 2), 0.9))


def test_frozen_and_gradientless_parameters_do_not_move() -> None:
    """A frozen parameter has no state; one that took no part in the loss keeps its weights and moments."""
    module = nn.Linear(3, 2)
    module.bias.requires_grad = False
    optimizer = build_optimizer(module.named_parameters(), OptimConfig())
    assert "bias.mean" not in optimizer.state_dict()
    before = module.weight.detach().clone()
    optimizer.step(0.1, 1.0)
    assert torch.equal(module.weight, before)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    """The norm over parameters of two shapes and both precisions is the root of the sum of squares."""
    one, two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = build_optimizer([("one", one), ("two", two)], OptimConfig())
    assert optimizer.gradient_norm().item() == 0.0
    one.grad, two.grad = torch.tensor([1.0, 2.0, 4.0]), torch.full((2, 2), 3.0, dtype=torch.bfloat16)
    assert optimizer.gradient_norm().item() == pytest.approx((1 + 4 + 16 + 36) ** 0.5, rel=1e-6)


def test_the_norm_of_millions_keeps_its_digits_and_makes_no_copy() -> None:
    """A long gradient in bfloat16 is summed in parts: right to five digits (whole: to three), and never widened."""
    long = nn.Parameter(torch.zeros(2_000_003, dtype=torch.bfloat16))
    optimizer = build_optimizer([("long", long)], OptimConfig(), "bfloat16")
    long.grad = torch.randn(long.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        norm = optimizer.gradient_norm().item()
    assert norm == pytest.approx(long.grad.double().norm().item(), rel=1e-5)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < long.grad.nbytes / 2


def test_the_gradients_are_gone_after_the_step() -> None:
    """After the step no gradient holds memory or leaks into the next step."""
    module = nn.Linear(3, 2)
    optimizer = build_optimizer(module.named_parameters(), OptimConfig())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step(0.1, 1.0)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("shape", [(24, 24), (8, 60), (60, 8), (1, 5)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_newton_schulz_is_the_same_in_each_dtype_up_to_its_rounding(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    """Against the same five steps in float64; no singular value of the result is above 1.3, and the input stays."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = matrix.clone()
    exact, found = orthogonalized(matrix, torch.float64), orthogonalized(matrix.to(dtype), dtype).double()
    assert torch.equal(matrix, kept)
    assert (found - exact).norm() / exact.norm() <= bound
    assert float(torch.linalg.svdvals(exact).max()) <= 1.3


def test_muon_multiplies_in_the_dtype_it_is_told() -> None:
    """float32 and bfloat16 move the weights differently, and each as the function says."""
    moved = {}
    for name in ("float32", "bfloat16"):
        module = _module()
        config = OptimConfig(optimizer="muon", lr=1e-2, weight_decay=0.0, muon_dtype=name)
        optimizer = build_optimizer(module.named_parameters(), config, "float32")
        before, gradient = module[0].weight.detach().clone(), _gradients(module, 0, torch.float32)[0]
        module[0].weight.grad = gradient.clone()
        optimizer.step(1e-2, 1.0)
        mean = gradient * 0.05
        size = 0.2 * max(before.shape) ** 0.5
        expected = before - 1e-2 * size * orthogonalized(gradient.lerp(mean, 0.95), getattr(torch, name)).float()
        torch.testing.assert_close(module[0].weight, expected, rtol=1e-5, atol=1e-7)
        moved[name] = module[0].weight.detach()
    assert not torch.equal(moved["float32"], moved["bfloat16"])


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_comes_back_byte_for_byte(kind: str, precision: str) -> None:
    """A fresh optimizer that loads weights and state of another goes on exactly as that one does."""
    config = OptimConfig(optimizer=kind, lr=1e-2)
    dtype = getattr(torch, precision)
    one, two = _module(), _module()
    first, second = (build_optimizer(m.named_parameters(), config, precision) for m in (one, two))
    _train(one, first, config, dtype)
    two.load_state_dict(one.state_dict())
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for module, optimizer in ((one, first), (two, second)):
        _train(module, optimizer, config, dtype)
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_state_of_another_model_is_refused() -> None:
    """Missing, unknown and misshapen state is refused with the names."""
    optimizer = build_optimizer(nn.Linear(3, 2).named_parameters(), OptimConfig())
    state = optimizer.state_dict()
    other = {name.replace("bias", "scale"): tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"missing \['bias.mean', 'bias.squares'\], unknown \['scale.mean', "):
        optimizer.load_state_dict(other)
    with pytest.raises(
        CheckpointError, match=r"weight.mean must be torch.float32 \(2, 3\), .* torch.bfloat16 \(2, 3\)"
    ):
        optimizer.load_state_dict(state | {"weight.mean": torch.zeros(2, 3, dtype=torch.bfloat16)})


def test_nothing_to_train_is_refused() -> None:
    """A module with all parameters frozen cannot be trained, and the message says what to do."""
    with pytest.raises(ConfigError, match=r"no parameter requires a gradient.*unfreeze some or add an adapter"):
        build_optimizer([("w", nn.Parameter(torch.ones(2), requires_grad=False))], OptimConfig())


def test_a_type_that_cannot_be_trained_is_refused() -> None:
    """float16 has no masters here, so it is refused by name."""
    with pytest.raises(ConfigError, match=r"parameter w must be bfloat16, float32 or float64 to be trained.*float16"):
        build_optimizer([("w", nn.Parameter(torch.ones(2, dtype=torch.float16)))], OptimConfig())


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adamw_step_needs_no_memory(precision: str, kind: str) -> None:
    """With every further byte refused by the kernel, a step still succeeds, so it cannot be torn by lack of memory."""
    script = _STARVED.format(precision=precision, kind=kind, path=sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "control: can't allocate memory\nstepped\n"


_STARVED = """
import sys, resource
sys.path[:] = {path!r}
import torch
torch.set_num_threads(1)
from entrenar.train.optim import OptimConfig, build_optimizer
w = torch.nn.Parameter(torch.ones(3000, 1000))
optimizer = build_optimizer([("w", w)], OptimConfig(optimizer="{kind}"), "{precision}")
w.grad = torch.ones_like(w)
optimizer.step(0.1, 1.0)
w.grad = torch.ones_like(w)
data_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((data_kb + 1024) * 1024,) * 2)
try:
    torch.ones(3000, 1000)
except RuntimeError as error:
    print("control:", "can't allocate memory" if "can't allocate memory" in str(error) else error)
optimizer.step(0.1, 1.0)
print("stepped")
"""

"""Gradient checks of the layers and of the whole LLaMA: plain, packed, tied, recomputed, with adapters, over four bits.

The gate is torch's gradcheck in float64, element by element, of each parameter. The specification's own check (section
2.3: float32, a step of 1e-3, a threshold of 0.2) is made beside it and its figure kept. `tests/ops` checks the
operations one by one; what can still be wrong here is how the model joins them. Every test of this file is a gradient
check: one that checks none fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from entrenar import ops
from entrenar.model import Llama, LlamaConfig
from entrenar.model.llama import Block, Context
from entrenar.model.rope_scaling import RotaryTable
from entrenar.peft import LoraConfig, from_base, put_quantized
from entrenar.peft.targets import projections

from .mutants import planted
from .strategies import normal

CONFIG = LlamaConfig(
    vocab_size=5, hidden_size=4, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=3,
    max_seq_len=8, rms_norm_eps=1e-2,
)  # fmt: skip
IDS = torch.tensor([[0, 3, 1, 4, 2], [2, 2, 0, 1, 3]])
TARGETS = torch.tensor([[3, 1, -100, 2, 0], [2, -100, 1, 3, 4]])
SPANS = (((0, 2), (2, 5)), ((0, 1), (1, 3), (3, 5)))
DOCUMENTS = ops.Documents.from_spans(SPANS)
SPECIFIED_STEP, SPECIFIED_THRESHOLD = 1e-3, 0.2
OPS = ("attention", "linear", "linear_cross_entropy", "rms_norm", "rope", "swiglu")


@dataclass(frozen=True)
class Subject:
    """A scalar, and the leaves that it is differentiated by: a module's trained parameters, and a layer's input."""

    module: nn.Module
    scalar: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    ops: tuple[str, ...]

    def to(self, dtype: torch.dtype) -> "Subject":
        """Convert everything in place: the leaves stay the module's own."""
        self.module.to(dtype)
        for leaf in self.leaves.values():
            leaf.data = leaf.data.to(dtype)
        return self


def drawn(module: nn.Module) -> dict[str, Tensor]:
    """Fill every trained parameter with numbers of size one, so that no gradient vanishes; return them."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for place, value in enumerate(trained.values()):
        value.data.copy_(0.7 * normal(place, *value.shape) + (value.ndim == 1))
    return trained


def whole(
    *, documents: ops.DocumentSpans | None = None, checkpointing: str = "none", adapted: bool = False,
    nf4: bool = False, **changes: object,
) -> Subject:  # fmt: skip
    """Return the loss of the whole model by its parameters, or by its adapters if it has any."""
    model = Llama(CONFIG.model_copy(update=changes)).double()
    drawn(model)
    model.checkpointing = checkpointing
    if nf4:
        for name, module in projections(model).items():
            put_quantized(model, name, ops.quantize_nf4(module.weight.float()), torch.float64)
    if adapted:
        config = LoraConfig(rank=2, lora_alpha=3, target_modules=("q_proj", "v_proj", "down_proj"))
        from_base(model, config, torch.Generator().manual_seed(0))
        model.double()
    product = ("quantized_linear",) if nf4 else ("lora_linear",) if adapted else ()
    return Subject(model, lambda: model.loss(IDS, TARGETS, documents=documents), drawn(model), (*OPS, *product))


def layer(
    choose: Callable[[Block], nn.Module], *ops_of: str, packed: bool = False, asked: Tensor | None = None
) -> Subject:
    """Return a fixed combination of a layer's outputs, by its input and parameters."""
    module = choose(Block(CONFIG, 0).double())
    rotary, x = RotaryTable(CONFIG), normal(7, 2, 5, CONFIG.hidden_size).requires_grad_()
    cos, sin = rotary.of_documents(DOCUMENTS) if packed else (table[None] for table in rotary.rows(5, x.device))
    context = Context(cos, sin, DOCUMENTS if packed else None)
    arguments = (context, asked) if "attention" in ops_of else ()

    def scalar() -> Tensor:
        y = module(x, *arguments)
        return (y * normal(99, *y.shape).to(y.dtype)).sum()

    return Subject(module, scalar, {"x": x, **drawn(module)}, ops_of)


BLOCK_OPS = tuple(op for op in OPS if op != "linear_cross_entropy")
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "RMSNorm": lambda: layer(lambda block: block.input_layernorm, "rms_norm"),
    "attention": lambda: layer(lambda block: block.self_attn, "attention", "rope", "linear"),
    "packed attention": lambda: layer(lambda block: block.self_attn, "attention", "rope", "linear", packed=True),
    "MLP": lambda: layer(lambda block: block.mlp, "swiglu", "linear"),
    "block": lambda: layer(lambda block: block, *BLOCK_OPS),
    "block, three tokens asked": lambda: layer(lambda block: block, *BLOCK_OPS, asked=torch.tensor([0, 4, 7])),
    "model": whole,
    "packed model of two layers": lambda: whole(documents=SPANS, num_layers=2),
    "tied model": lambda: whole(tie_word_embeddings=True),
    "recomputed model": lambda: whole(documents=SPANS, checkpointing="full"),
    "model with LoRA": lambda: whole(adapted=True),
    "model with LoRA over NF4": lambda: whole(adapted=True, nf4=True),
}
LEAVES = [(subject, name) for subject, make in SUBJECTS.items() for name in make().leaves]
CHECKED: list[str] = []


def gradcheck(scalar: Callable[[], Tensor], leaf: Tensor) -> bool:
    """Compare the gradient with central differences, which torch takes by moving each element of the leaf in place."""
    CHECKED.append(str(tuple(leaf.shape)))
    return torch.autograd.gradcheck(lambda _: scalar(), leaf, eps=1e-6, atol=1e-6, rtol=1e-5)


def specified_error(scalar: Callable[[], Tensor], leaf: Tensor) -> float:
    """Return how far the gradient is from central differences with the specification's step, relatively."""
    (gradient,) = torch.autograd.grad(scalar(), leaf)
    differences = torch.zeros_like(leaf)
    with torch.no_grad():
        for place, value in enumerate(leaf.flatten().tolist()):
            ends = []
            for step in (SPECIFIED_STEP, -SPECIFIED_STEP):
                leaf.view(-1)[place] = value + step
                ends.append(scalar())
            leaf.view(-1)[place] = value
            differences.view(-1)[place] = (ends[0] - ends[1]) / (2 * SPECIFIED_STEP)
    return float((gradient - differences).norm() / differences.norm())


def demand_a_check(checked: list[str]) -> None:
    assert checked, "this test checks no gradient, and this file has nothing else"


@pytest.fixture(autouse=True)
def every_test_checks_a_gradient() -> Iterator[None]:
    CHECKED.clear()
    yield
    demand_a_check(CHECKED)


@pytest.mark.parametrize(("subject", "name"), LEAVES)
def test_gradient_is_the_derivative(subject, name, certificate):
    """In float64 to 1e-5 by each element of each parameter; in float32 within the specification's threshold."""
    found = SUBJECTS[subject]()
    assert gradcheck(found.scalar, found.leaves[name])
    error = specified_error(found.to(torch.float32).scalar, found.leaves[name])
    assert error < SPECIFIED_THRESHOLD
    for op in found.ops:
        case = f"{subject}: {name}"
        certificate.add(op, "gradcheck", method="within layers and models, float64", case=case, rtol=1e-5)
        method = "the specification's, within layers and models: float32, eps 1e-3, threshold 0.2"
        certificate.add(op, "gradcheck", method=method, case=case, relative=error, threshold=SPECIFIED_THRESHOLD)


LAYER_0 = "model.layers.0"
# subject, parameter, module, text of its source, the error in its place
BROKEN = {
    "residual stream cut": (
        "model", "model.embed_tokens.weight", "model.llama",
        "x = _select(x, asked) + self.self_attn", "x = _select(x.detach(), asked) + self.self_attn"),
    "branch of attention cut": (
        "block", "x", "model.llama",
        "self.self_attn(self.input_layernorm(x), context, asked)",
        "self.self_attn(self.input_layernorm(x).detach(), context, asked)"),
    "keys cut": (
        "attention", "k_proj.weight", "model.llama",
        "k = self.k_proj(x).view(heads).transpose(1, 2)", "k = self.k_proj(x).detach().view(heads).transpose(1, 2)"),
    "gate cut": ("MLP", "gate_proj.weight", "model.llama", "ops.swiglu(self.gate_proj(x),",
                 "ops.swiglu(self.gate_proj(x).detach(),"),
    "rotation not turned back": (
        "model", f"{LAYER_0}.self_attn.q_proj.weight", "ops.rope",
        "rope_forward(dfirst, dsecond, cos, -sin)", "rope_forward(dfirst, dsecond, cos, sin)"),
    "1/D missing": ("RMSNorm", "x", "ops.rms_norm", "rstd * rstd * rstd / x.shape[-1]", "rstd * rstd * rstd"),
    "mask missing in the backward": (
        "packed attention", "x", "ops.attention", "logsumexp, 0.0, is_causal=True", "logsumexp, 0.0, is_causal=False"),
    "activations of another input recomputed": (
        "recomputed model", "model.embed_tokens.weight", "model.llama",
        "recomputed(lambda x: cast(Tensor, block(x, context, asked)), x)",
        "recomputed(lambda x: cast(Tensor, block(x, context, asked)), x.detach())"),
    "tied head cut": (
        "tied model", "model.embed_tokens.weight", "model.llama",
        "return head.weight if quantized is None else quantized",
        "return head.weight.detach() if quantized is None else quantized"),
    "scale of the adapter missing": (
        "model with LoRA", f"{LAYER_0}.self_attn.q_proj.adapters.default.lora_B", "ops.lora_linear",
        "(low.mT @ dy).mul_(scale)", "(low.mT @ dy)"),
    "frozen product missing in dx over four bits": (
        "model with LoRA over NF4", f"{LAYER_0}.self_attn.q_proj.adapters.default.lora_A", "ops.quantized.linear",
        "dx = frozen_input_gradient(dy,", "dx = 0 * frozen_input_gradient(dy,"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_refuses_an_error_in_the_source(name, certificate):
    """With one error planted the check that passes without it fails."""
    subject, parameter, module, old, new = BROKEN[name]
    found = SUBJECTS[subject]()
    with planted(f"entrenar.{module}", old, new), pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(found.scalar, found.leaves[parameter])
    if module.startswith("ops."):  # an error of the model's is no operation's wrong backward
        operation = {"ops.quantized.linear": "quantized_linear"}.get(module, module.removeprefix("ops."))
        certificate.add(operation, "controls", proof="gradcheck within layers and models", planted=name)


def test_a_test_without_a_gradient_check_fails():
    """The fixture that every test here runs under ends in a failure when nothing was checked."""
    with pytest.raises(AssertionError, match="this test checks no gradient"):
        demand_a_check(CHECKED)
    x = normal(0, 3).requires_grad_()
    assert gradcheck(lambda: x.sin().sum(), x)

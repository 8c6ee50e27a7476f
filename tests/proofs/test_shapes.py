"""Shapes for all sizes: forward and backward traced with symbolic dimensions keep them, and narrow none.

`make_fx` runs forward and gradient on tensors whose sizes are symbols, and records each fact that it had to assume of
them. A proof is a trace that assumed nothing but what is listed; sizes 0 and 1, which it leaves out, are run as they
are in `tests/ops`. Rows in one block: that blocks hold every row once is proved in `test_bounded.py`.
"""

import importlib
import operator
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from entrenar.model import Llama, LlamaConfig
from entrenar.model.llama import Context

from ..mutants import mutant

pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore:.*")]  # the tracer's own warnings

Op = Callable[..., Tensor]


def traced(op: Op, sizes: list[tuple[int, ...]]) -> tuple[list[str], list[str], list[str]]:
    """Return the symbolic shapes of inputs, of output and gradients, and what was assumed of them."""

    def step(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = op(*inputs)
        return y, torch.autograd.grad(y.sum(), inputs)

    graph = make_fx(step, tracing_mode="symbolic")(*(torch.ones(size, requires_grad=True) for size in sizes))
    nodes = list(graph.graph.nodes)
    y, grads = next(node.args[0] for node in nodes if node.op == "output")
    given = [str(tuple(node.meta["val"].shape)) for node in nodes if node.op == "placeholder"]
    environment = graph.shape_env
    assumed = [str(guard.expr) for guard in environment.guards] + [
        str(fact) for fact in environment.replacements.items()
    ]
    return given, [str(tuple(x.meta["val"].shape)) for x in (y, *grads)], assumed


def in_one_block(module: ModuleType) -> ModuleType:
    """Have a copy of a module cut nothing."""
    module.row_blocks = lambda _: [slice(None)]
    return module


def rope(module: ModuleType) -> Op:
    def op(x: Tensor) -> Tensor:
        table = torch.ones(1, x.shape[2], x.shape[3] // 2)
        return module.rope(x, table, table)

    return op


# The operation of a module, sizes that are all different, what may be assumed, and a twin that assumes more.
SHAPES: dict[str, tuple[Callable[[ModuleType], Op], list[tuple[int, ...]], list[str], tuple[str, str]]] = {
    "attention": (
        lambda m: lambda q, k, v: m.attention(q, k, v, scale=0.5), [(3, 4, 5, 10), (3, 2, 5, 10), (3, 2, 5, 10)],
        ["H is a multiple of G"], ("scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale\n    if q.device",
                                   "scale = scale + 0 * int(q.shape[2])\n    if q.device")),
    "linear": (
        lambda m: lambda x, w: m.linear(x, w, torch.float64), [(3, 5, 6), (4, 6)], [],
        ("return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])",
         "return y.to(x.dtype).view(3, 5, weight.shape[0])")),
    "lora_linear": (
        lambda m: lambda *x: m.lora_linear(*x, scale=2.0), [(3, 5, 6), (4, 6), (2, 6), (4, 2)], [],
        ("rows = x.reshape(-1, x.shape[-1]).to(compute_dtype)  # (N, I)",
         "rows = x.reshape(15, -1).to(compute_dtype)")),
    "rms_norm": (
        lambda m: lambda x, w: in_one_block(m).rms_norm(x, w, 1e-5), [(3, 5, 6), (6,)], [],
        ("return y.reshape(x.shape)", "return y.reshape(3, *x.shape[1:])")),
    "rope": (
        lambda m: rope(in_one_block(m)), [(3, 4, 5, 6)], ["K is even and not 2"],
        ("y = torch.empty_like(x)", "y = torch.empty_like(x) if x.shape[1] == 4 else x")),
    "swiglu": (
        lambda m: m.swiglu, [(3, 5, 6), (3, 5, 6)], [],
        ("return silu(gate).mul_(up)  # (1)", "return silu(gate).mul_(up) if len(gate) < 4 else up * 1")),
}  # fmt: skip


def about_halves(fact: str) -> bool:
    """Whether a fact only says that a head has two halves of more than one plane: it holds at every such size."""
    halved = re.search(r"\((s\d+)//2\)", fact)
    if halved is None:
        return False
    words = {"Eq": operator.eq, "Ne": operator.ne, "Mod": operator.mod, "Max": max}
    others = set(re.findall(r"s\d+", fact)) - {halved[1]}
    return all(
        eval(fact, words | dict.fromkeys(others, size) | {halved[1]: width})  # noqa: S307 - the tracer's own text
        for width in (4, 6, 8, 64, 130)
        for size in (2, 3, 16)
    )


def assumed_beyond(name: str, module: ModuleType) -> list[str]:
    """Return what a trace assumed and may not, with shapes that are not those of the inputs."""
    build, sizes, allowed, _ = SHAPES[name]
    given, results, assumed = traced(build(module), sizes)
    if "H is a multiple of G" in allowed:
        assumed = [fact for fact in assumed if not fact.startswith("Eq(Mod(")]
    if "K is even and not 2" in allowed:
        assumed = [fact for fact in assumed if not about_halves(fact)]
    wrong = [] if results[1:] == given else [f"gradients {results[1:]} for {given}"]
    return assumed + wrong


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_hold_for_all_sizes(name, certificate):
    """Each gradient has the symbols of its input, and no size is narrowed."""
    assert assumed_beyond(name, mutant(f"entrenar.ops.{name}")) == []
    certificate.add(
        name, "shapes", statement="gradients have the shapes of inputs", bound="all sizes from 2", but=SHAPES[name][2]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_broken_twin_narrows_a_size(name):
    """A size written into the source, or looked at, is found in what the trace had to assume."""
    assert assumed_beyond(name, mutant(f"entrenar.ops.{name}", SHAPES[name][3]))


def test_a_width_of_heads_written_into_the_source_is_no_statement_about_halves():
    """A rotation that looks at the half of a head's width, and so narrows it, is found among what may be assumed."""
    twin = ("y = torch.empty_like(x)", "y = torch.empty_like(x) if x.shape[-1] // 2 == 3 else x")
    assert any("//2), 3)" in fact for fact in assumed_beyond("rope", mutant("entrenar.ops.rope", twin)))
    assert about_halves("Eq(s9 - ((s9//2)), (s9//2))")
    assert not about_halves("Eq((s9//2), 3)")


def tiny() -> Llama:
    model = Llama(LlamaConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_seq_len=64
    ))  # fmt: skip
    model.init_weights(torch.Generator())
    return model


class Trunk(torch.nn.Module):
    """The blocks and the last norm, given the tables that the model looks up."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.decoder = model.model

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = self.decoder.norm(self.decoder.blocks(x, Context(cos, sin)))
        assert isinstance(out, Tensor)
        return out


def test_the_models_trunk_keeps_batch_and_time_for_all_sizes(monkeypatch):
    """Exported with both as symbols, the last state has them unchanged over the whole range."""
    for name in ("rms_norm", "rope"):
        monkeypatch.setattr(importlib.import_module(f"entrenar.ops.{name}"), "row_blocks", lambda _: [slice(None)])
    batch, time = Dim("B", min=2, max=4096), Dim("T", min=2, max=131_072)
    inputs = (torch.zeros(3, 5, 16), torch.ones(1, 5, 2), torch.ones(1, 5, 2))
    sizes = {"x": {0: batch, 1: time}, "cos": {1: time}, "sin": {1: time}}
    program = export(Trunk(tiny()), inputs, dynamic_shapes=sizes, strict=False)
    nodes = {node.name: node for node in program.graph.nodes}
    given = nodes[program.graph_signature.user_inputs[0]].meta["val"].shape
    result = nodes[program.graph_signature.user_outputs[0]].meta["val"].shape
    assert [str(size) for size in result] == [str(size) for size in given]
    ranges = {str(name): (bounds.lower, bounds.upper) for name, bounds in program.range_constraints.items()}
    assert [ranges[str(size)] for size in given[:2]] == [(2, 4096), (2, 131_072)]


def test_a_length_that_the_model_looks_at_is_refused():
    """With its rows in blocks, whose number depends on the sizes, the same export says so."""
    inputs = (torch.zeros(3, 5, 16), torch.ones(1, 5, 2), torch.ones(1, 5, 2))
    sizes = {"x": {0: Dim("B"), 1: (time := Dim("T"))}, "cos": {1: time}, "sin": {1: time}}
    with pytest.raises(UserError, match="Constraints violated"):
        export(Trunk(tiny()), inputs, dynamic_shapes=sizes, strict=False)

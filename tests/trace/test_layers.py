"""Layers get spans from outside: forward and backward, the short ones counted in their parent, nothing else changed."""

import pytest
import torch
from torch import nn

from entrenar.trace.join import Join
from entrenar.trace.launch import Wants
from entrenar.trace.layers import attach, span_name
from entrenar.trace.provider import Provider
from entrenar.trace.recorder import Recorder
from entrenar.trace.spool import Spool


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.mlp(self.self_attn(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def steps(folder, *, groups="layers", shortest_ns=0, is_compiled=False, fail=False):
    """Train two steps under spans of phases; return the finished spans and the gradients."""
    torch.manual_seed(0)
    model = Model()
    provider = Provider(Recorder(folder), Wants(folder, 1, 0xF, groups, shortest_ns))
    tracer = provider.get_tracer()
    detach = attach(model, provider.recorder, provider.wants, is_compiled=is_compiled)
    for _ in range(2):
        with tracer.start_as_current_span("forward_pass"):
            loss = model(torch.ones(3, 8)).sum()
            if fail:
                with pytest.raises(RuntimeError):
                    model(torch.ones(3, 9))
        with tracer.start_as_current_span("backward_pass"):
            loss.backward()
    detach()
    model(torch.ones(3, 8))
    return Join().take(Spool(folder).drain(), (), None).ended, [parameter.grad for parameter in model.parameters()]


def tree(spans):
    names = {span.id: span.name for span in spans} | {0xF: "process"}
    return [(names[span.parent], span.name) for span in sorted(spans, key=lambda span: span.id)]


FORWARD = [("forward_pass", f"{kind}_layer_{number}") for number in (0, 1) for kind in ("attention", "mlp")]
BACKWARD = [("backward_pass", f"backward: {kind}_layer_{number}") for number in (1, 0) for kind in ("mlp", "attention")]


def test_layers_lie_under_their_phase_forward_and_backward(tmp_path):
    """Two steps give the same tree twice, and after `detach` nothing is recorded."""
    spans, _ = steps(tmp_path)
    step = [("process", "forward_pass"), *FORWARD, ("process", "backward_pass"), *BACKWARD]
    assert tree(spans) == step * 2
    by_id = {span.id: span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent)
        assert parent is None or parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns


def test_gradients_are_those_without_spans(tmp_path):
    """A hook changes no number."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    _, traced = steps(tmp_path / "with", groups="all")
    _, plain = steps(tmp_path / "without", groups="phases")
    assert all(torch.equal(one, other) for one, other in zip(traced, plain, strict=True))


def test_every_module_has_a_span_if_all_is_asked_for(tmp_path):
    """Leaves lie under their layer."""
    spans, _ = steps(tmp_path, groups="all")
    assert ("mlp_layer_0", "compute: 0") in tree(spans)
    assert ("mlp_layer_1", "compute: 1") in tree(spans)


def test_blocks_below_the_threshold_are_counted_in_their_parent(tmp_path):
    """Nothing is that slow: layers vanish, and what a leaf's parent would have counted with them."""
    spans, _ = steps(tmp_path, shortest_ns=10**12)
    assert [pair for pair in tree(spans) if pair in FORWARD] == []
    (tmp_path / "all").mkdir()
    slow = steps(tmp_path / "all", groups="all", shortest_ns=0)[0]
    assert len([pair for pair in tree(slow) if pair in FORWARD]) == 8


def test_short_children_are_written_on_their_parent(tmp_path, monkeypatch):
    """Count and time of what was not kept."""
    ticks = iter(range(0, 10**9, 60_000))
    monkeypatch.setattr("entrenar.trace.layers.time.monotonic_ns", lambda: next(ticks))
    spans, _ = steps(tmp_path, groups="all", shortest_ns=100_000)
    mlps = [span for span in spans if span.name == "mlp_layer_0"]
    assert [dict(span.attributes) for span in mlps] == [
        {"short.compute: 0": "1 x, 60 us", "short.compute: 1": "1 x, 60 us"}
    ] * 2


def test_a_compiled_model_is_left_alone(tmp_path):
    """A hook inside would break its graph."""
    spans, _ = steps(tmp_path, is_compiled=True)
    assert {span.name for span in spans} == {"forward_pass", "backward_pass"}


def test_a_forward_that_fails_leaves_no_block_open(tmp_path):
    """The next step's layers lie where they belong."""
    spans, _ = steps(tmp_path, fail=True)
    forward = [pair for pair in tree(spans) if pair[1].endswith(("_layer_0", "_layer_1")) and "backward" not in pair[1]]
    assert {parent for parent, _ in forward} == {"forward_pass"}


@pytest.mark.parametrize(
    ("path", "groups", "name"),
    [
        ("m.layers.11.self_attn", "layers", "attention_layer_11"), ("h.3.attn", "layers", "attention_layer_3"),
        ("model.layers.0.mlp", "layers", "mlp_layer_0"), ("layers.2.feed_forward", "layers", "mlp_layer_2"),
        ("layers.0.self_attn.q_proj", "layers", None), ("layers.0.self_attn.q_proj", "all", "compute: q_proj"),
        ("lm_head", "all", "compute: lm_head"), ("", "all", None), ("model", "all", None),
    ],
)  # fmt: skip
def test_modules_are_named_by_their_place(path, groups, name):
    """Names of models in use; what is no layer has a span only if all is asked for."""
    assert span_name(path, is_leaf=path not in ("", "model"), groups=groups) == name

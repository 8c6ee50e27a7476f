"""Spans of a model's layers, by hooks from outside: the model knows nothing of them.

    forward_pass > attention_layer_0, mlp_layer_0, …          group "layers"
                     > compute: q_proj, …                      and with group "all" every module

Forward hooks open and close a span. For the backward pass a hook on each layer's output notes when its gradient
arrives: that is when the layer's backward begins, and the arrival at the layer below is when it ends (a full backward
hook would cost six times as much and insert an autograd node per module). These spans are intervals between arrivals.

A block shorter than the threshold is not kept; its parent counts it, with its time. Modules are met by what they do
(`named_modules`, hooks), so that nothing here imports torch.
"""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace as api

from entrenar.trace.launch import Wants
from entrenar.trace.recorder import Recorder

_NUMBER = re.compile(r"\.(\d+)\.")
# What the sub-layers of a transformer block are called in models in use.
_ATTENTION = re.compile(r"(self_attn|attn|attention|self_attention)$")
_MLP = re.compile(r"(mlp|feed_forward|ffn)$")


@dataclass(slots=True)
class _Open:
    """A block that is under way, and what its short children came to: name -> (count, nanoseconds)."""

    span: int
    started_ns: int
    phase: int
    short: dict[str, list[int]] = field(default_factory=dict)


def attach(module: Any, recorder: Recorder, wants: Wants, *, is_compiled: bool = False) -> Callable[[], None]:
    """Hook the layers of `module`, or, if it is compiled, nothing: a hook inside would break its graph.

    Return a function that takes the hooks off again.
    """
    if is_compiled or wants.groups == "phases":
        return lambda: None
    spans = _LayerSpans(recorder, wants.shortest_ns)
    handles: list[Any] = []
    for path, part in module.named_modules():
        name = span_name(path, is_leaf=not any(True for _ in part.children()), groups=wants.groups)
        if name is not None:
            handles.append(part.register_forward_pre_hook(spans.before(name)))
            # Also when forward raises, so that no block stays open.
            handles.append(part.register_forward_hook(spans.after(name), always_call=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def span_name(path: str, *, is_leaf: bool, groups: str) -> str | None:
    """Return the name of a module's span: attention_layer_3, mlp_layer_3, compute: q_proj; None if it has none."""
    number = _NUMBER.search(f"{path}.")
    if number is not None and _ATTENTION.search(path):
        return f"attention_layer_{number[1]}"
    if number is not None and _MLP.search(path):
        return f"mlp_layer_{number[1]}"
    if groups == "all" and path and is_leaf:
        return f"compute: {path.rpartition('.')[2]}"
    return None


class _LayerSpans:
    """Blocks under way, by thread."""

    def __init__(self, recorder: Recorder, shortest_ns: int) -> None:
        self._recorder, self._shortest_ns = recorder, shortest_ns
        self._stacks = threading.local()
        # The phase that the thread of the step is in: gradients of a GPU arrive on threads that know no phase.
        self._phase = 0
        self._arrived: _Open | None = None

    def before(self, name: str) -> Callable[..., None]:
        """Return the hook that opens `name`."""

        def hook(*_: Any) -> None:
            stack, phase = self._stack(), _current_span()
            if stack and stack[0].phase != phase:
                stack.clear()  # a step was broken off
            parent = stack[-1].span if stack else phase
            now = time.monotonic_ns()
            self._phase = phase
            stack.append(_Open(self._recorder.start(parent, name, now), now, phase))

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """Return the hook that closes `name`, and waits for the gradient of its output."""

        def hook(_: Any, __: Any, output: Any) -> None:
            stack = self._stack()
            if stack:
                self._close(name, stack)
            first = output[0] if isinstance(output, (tuple, list)) else output
            if getattr(first, "requires_grad", False) and not name.startswith("compute"):
                first.register_hook(self._on_gradient(f"backward: {name}"))

        return hook

    def _close(self, name: str, stack: list[_Open]) -> None:
        now = time.monotonic_ns()
        block = stack.pop()
        elapsed = now - block.started_ns
        if elapsed >= self._shortest_ns:
            attributes = {
                f"short.{other}": f"{count} x, {ns / 1e3:.0f} us" for other, (count, ns) in block.short.items()
            }
            self._recorder.end(block.span, now, attributes=attributes)
            return
        self._recorder.drop(block.span, now)
        if stack:
            counted = stack[-1].short.setdefault(name, [0, 0])
            counted[0] += 1
            counted[1] += elapsed

    def _on_gradient(self, name: str) -> Callable[[Any], None]:
        def hook(_: Any) -> None:
            now = time.monotonic_ns()
            phase = _current_span() or self._phase
            before = self._arrived
            if before is not None and before.phase == phase:
                self._recorder.end(before.span, now)
            self._arrived = _Open(self._recorder.start(phase, name, now, ends_with_parent=True), now, phase)

        return hook

    def _stack(self) -> list[_Open]:
        try:
            return self._stacks.blocks  # type: ignore[no-any-return]
        except AttributeError:
            self._stacks.blocks = []
            return self._stacks.blocks  # type: ignore[no-any-return]


def _current_span() -> int:
    return api.get_current_span().get_span_context().span_id

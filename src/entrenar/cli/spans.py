"""Layer spans for a training run that is traced: hooks from outside, put on just before the loop begins."""

import sys

from opentelemetry import trace
from torch import nn

from entrenar.trace.layers import attach
from entrenar.trace.provider import Provider


def trace_layers(module: nn.Module, *, is_compiled: bool) -> None:
    """Hook the layers of `module` if a tracer asks for them; without one, nothing is touched and nothing costs."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, Provider) or provider.wants.groups == "phases":
        return
    if is_compiled:
        print("[entrenar: a compiled model has no layer spans: a hook inside would break its graph]", file=sys.stderr)
    attach(module, provider.recorder, provider.wants, is_compiled=is_compiled)

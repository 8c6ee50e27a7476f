"""Render chat templates in a separate process: one line of JSON in, one line of JSON out (see `chat_template`).

This file runs as a script and imports nothing from this package. The kernel limits its memory and its CPU time: the
profiling timer counts the time that the process itself has spent, so a busy machine takes nothing from a template, and
SIGPROF ends even an operation that never returns to Python. jinja2's sandbox keeps a template away from attributes and
from its inputs, and the text is counted while it grows.

The process never outlives its parent. Linux kills it (PR_SET_PDEATHSIG); elsewhere a thread waits for the parent's end
of the pipe to close.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 4_000_000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# SyntaxError: jinja2 writes Python, and Python refuses some of it, such as a break outside a loop.
_PROBLEMS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, SyntaxError)
Span = tuple[int, int]


class TextTooLongError(Exception):
    """The rendered text has more than MAX_CHARACTERS."""


class GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`: the template itself marks the assistant's words."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way to name an extension's tags

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written = 0
        self.spans: list[Span] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call that notes where its text stands."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


def environment(today: str = "") -> ImmutableSandboxedEnvironment:
    """Return the environment that Hugging Face's chat templates are written for; its clock stands still on `today`."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:  # the defaults differ from jinja2's, which escapes HTML
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def strftime_now(form: str) -> str:
        now = datetime.fromisoformat(today) if today else datetime.now()  # local time, as transformers has it
        return now.strftime(form)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str, list[Span]]:
    """Return the text and the spans of its generation blocks; stop as soon as the text is too long."""
    parts: list[str] = []
    blocks = template.environment.extensions[GenerationBlocks.identifier]
    assert isinstance(blocks, GenerationBlocks)  # noqa: S101  # `environment` put it there
    blocks.written, blocks.spans = 0, []
    for part in template.generate(**variables):
        blocks.written += len(part)
        if blocks.written > MAX_CHARACTERS:
            raise TextTooLongError
        parts.append(part)
    return "".join(parts), blocks.spans


def answer(template: jinja2.Template, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the text and its spans, or why there is none."""
    try:
        text, spans = render(template, variables)
    except TextTooLongError:
        return {"error": f"the text is longer than {MAX_CHARACTERS} characters"}
    except (MemoryError, RecursionError) as error:
        return {"error": f"it needs too much memory or recursion ({type(error).__name__})"}
    except _PROBLEMS as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text, "spans": spans}


def die_with_parent(parent: int) -> None:
    """End this process when its parent ends, also in the middle of a template."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_exit_at_hang_up, daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def _exit_at_hang_up() -> None:
    pipe = select.poll()
    pipe.register(sys.stdin.fileno(), 0)  # hang-ups are always reported; pending lines are not asked for
    pipe.poll()
    os._exit(1)


def limit_cpu(seconds: float) -> None:
    """Let the kernel end this process once it has spent `seconds` of CPU time from now on; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Compile the template in the first line, then render it for each following line.

    Arguments: CPU seconds for each of these, the parent's process id, and the date that templates are told, if fixed.
    """
    cpu_s, parent, today = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    die_with_parent(parent)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source = json.loads(sys.stdin.readline())
    limit_cpu(cpu_s)
    fault = template = None
    try:
        template = environment(today).from_string(source)
    except (MemoryError, RecursionError, *_PROBLEMS) as error:
        fault = {"error": f"{type(error).__name__}: {error}"}
    limit_cpu(0)
    for line in sys.stdin:
        limit_cpu(cpu_s)
        said = fault if template is None else answer(template, json.loads(line))
        limit_cpu(0)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

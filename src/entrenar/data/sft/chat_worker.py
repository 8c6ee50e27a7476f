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
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 4_000_000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PROBLEMS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class TextTooLongError(Exception):
    """The rendered text has more than MAX_CHARACTERS."""


def environment() -> ImmutableSandboxedEnvironment:
    """Return the surroundings that Hugging Face's chat templates are written for."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:  # the defaults differ from jinja2's, which escapes HTML
        return json.dumps(value, **{"ensure_ascii": False, **options})

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render, giving up as soon as the text is too long."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**variables):
        size += len(part)
        if size > MAX_CHARACTERS:
            raise TextTooLongError
        parts.append(part)
    return "".join(parts)


def _answer(template: jinja2.Template | str, line: str) -> dict[str, str]:
    if isinstance(template, str):
        return {"error": template}
    try:
        return {"text": render(template, json.loads(line))}
    except TextTooLongError:
        return {"error": f"the text is longer than {MAX_CHARACTERS} characters"}
    except (MemoryError, RecursionError) as error:
        return {"error": f"it needs too much memory or recursion ({type(error).__name__})"}
    except _PROBLEMS as error:
        return {"error": f"{type(error).__name__}: {error}"}


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

    Arguments: CPU seconds for each of these, and the parent's process id.
    """
    cpu_s, parent = float(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    template: jinja2.Template | str
    source = json.loads(sys.stdin.readline())
    limit_cpu(cpu_s)
    try:
        template = environment().from_string(source)
    except (MemoryError, RecursionError, *_PROBLEMS) as error:
        template = f"{type(error).__name__}: {error}"
    limit_cpu(0)
    for line in sys.stdin:
        limit_cpu(cpu_s)
        answer = _answer(template, line)
        limit_cpu(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

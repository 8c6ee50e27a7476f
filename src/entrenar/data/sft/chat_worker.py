"""The process that renders chat templates: one line of JSON in, one line of JSON out (see `chat_template`).

Run as a script, with nothing of this package imported. The kernel bounds its memory, the parent its time; jinja2's
sandbox keeps a template from reaching attributes and from changing what it was given; the text is counted as it grows.
"""

import json
import resource
import sys
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 4_000_000
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


def main() -> None:
    """Compile the template of the first line, then render it for each line that follows."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    template: jinja2.Template | str
    try:
        template = environment().from_string(json.loads(sys.stdin.readline()))
    except (MemoryError, RecursionError, *_PROBLEMS) as error:
        template = f"{type(error).__name__}: {error}"
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(template, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

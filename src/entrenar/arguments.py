"""Say messages in the words of a Python caller: `max_steps` where the command line says `--max-steps`.

Most messages are raised far below the library's front door and advise flags, because most readers typed them. Only the
names that the caller could have passed are changed; the flags in a quoted command (`entrenar convert … --to hf`) stay.
"""

import re
from collections.abc import Mapping

_QUOTED = re.compile(r"`[^`]*`")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)(?![\w-])")
_FLAG_IN_BRACKETS = re.compile(r"\(--([a-z][a-z0-9-]*) ([^()\s]+)\)")


def as_arguments(text: str, arguments: Mapping[str, bool]) -> str:
    """Return the text with flags as arguments; `arguments` says of each name whether it is True or False."""
    quoted = [(match.start(), match.end()) for match in _QUOTED.finditer(text) if " " in match[0]]

    def rewritten(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        is_quoted = any(start < match.start() < end for start, end in quoted)
        if name not in arguments or is_quoted:
            return match[0]
        if match.re is _FLAG_IN_BRACKETS:
            values = match[2].split(",")
            return f"({name}={values if len(values) > 1 else values[0]!r})"
        return f"{name}=True" if arguments[name] else name

    # The longer pattern first: its result holds no flag, so the places of quotes matter for the first pass alone.
    shorter = _FLAG_IN_BRACKETS.sub(rewritten, text)
    quoted = [(match.start(), match.end()) for match in _QUOTED.finditer(shorter) if " " in match[0]]
    return _FLAG.sub(rewritten, shorter)

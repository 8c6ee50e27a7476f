"""Hold what README and book say against the program: `python -m tests.documentation [PAGE…]` lists the faults.

Checked without running anything: commands and flags by the parsers of the program itself, make targets, scripts and
their flags, paths, links with their anchors, Python blocks by the names that they use. Tables of measurements are
written from their raw JSON by `benchmarks/tables.py`, and a picture must be as new as its data.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from entrenar.cli import flags
from entrenar.cli import main as program

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "docs", "benchmarks", "configs", "examples", "scripts", "quality", "fuzz", "prompts")
# Kept as they were written, or made by a program that has its own tests.
LEFT_OUT = ("docs/specifications", "docs/roadmaps")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]+")


def pages() -> list[Path]:
    """Return README, the book, the pages of the examples, and the page for contributors."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(page for page in found if not str(page.relative_to(ROOT)).startswith(LEFT_OUT))


def faults(page: Path, text: str | None = None) -> list[str]:
    """Return every statement of a page that does not hold."""
    text = page.read_text(encoding="utf-8") if text is None else text
    checks: tuple[Callable[[Path, str], Iterator[str]], ...] = (of_links, of_commands, of_inline, of_python)
    return [fault for check in checks for fault in check(page, text)]


def of_links(page: Path, text: str) -> Iterator[str]:
    """Yield relative links without a file, and anchors without a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / name if name else page
        if not file.exists():
            yield f"dead link: {target}"
        elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            yield f"no such heading: {target}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def typed(text: str) -> list[str]:
    """Return the commands of a page's shell blocks: lines after `$` in a console, all lines of a script."""
    return [line for language, block in _FENCE.findall(text) for line in _typed_in(language, block)]


def _typed_in(language: str, block: str) -> list[str]:
    whole = re.sub(r"\\\n\s*", "", block)
    if language == "console" or whole.startswith("$ "):
        return re.findall(r"^\$ (.+)$", whole, re.MULTILINE)
    if language in ("bash", "sh", "shell"):
        return [line for line in _statements(whole) if line and not line.startswith("#")]
    return [line for line in _statements(whole) if not language and re.match("(?:entrenar|make|python) ", line)]


def _statements(script: str) -> Iterator[str]:
    """Yield the lines of a script; a quoted text may go over several."""
    begun = ""
    for line in script.splitlines():
        begun += line
        if begun.count("'") % 2 == 0:
            yield begun
            begun = ""
        else:
            begun += "\n"
    if begun:
        yield begun


def of_commands(page: Path, text: str) -> Iterator[str]:
    """Yield typed commands that the program, make or a script would refuse."""
    for line in typed(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            yield f"{line}: {error}"
            continue
        yield from (f"{line}: no file {word}" for word in words if _PATH.fullmatch(word) and not _exists(page, word))
        for command in _parts(words):
            if (fault := _refusal(page, command)) is not None:
                yield f"{line}: {fault}"


def _parts(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield each command of a line, and the command that a tracer is given."""
    command: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&&", "||", "|", ">", "2>"):
            if command:
                yield command
            if "--" in command:
                yield command[command.index("--") + 1 :]
            command = [">"] if word.endswith(">") else []
        else:
            command.append(word.removesuffix(";"))


def _refusal(page: Path, command: list[str]) -> str | None:
    while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
        command = command[1:]
    if not command:
        return None
    name = Path(command[0]).name
    if name == "entrenar":
        return parse_fault(command[1:])
    if name == "make":
        return next((f"no target {word}" for word in command[1:] if not _is_target(page, word)), None)
    if name in ("torchrun", "python", "python3") and "entrenar" in command:
        return parse_fault(command[command.index("entrenar") + 1 :])
    if name in ("python", "python3") and len(command) > 1:
        return _script_fault(page, command[1:])
    return None


def _is_target(page: Path, word: str) -> bool:
    if word.startswith("-") or "=" in word:
        return True
    files = [ROOT / "Makefile", page.parent / "Makefile"]
    texts = [re.sub(r"\\\n", "", file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    lines = [line for text in texts for line in re.findall(r"^(?:([\w -]+):|TIERS := (.+)$)", text, re.MULTILINE)]
    return any(word in " ".join(line).split() for line in lines)


def _script_fault(page: Path, words: Sequence[str]) -> str | None:
    if words[0] == "-m":
        return None if importlib.util.find_spec(words[1]) else f"no module {words[1]}"
    if (
        words[0] == "-c"
        or words[0].startswith("generated")
        or (_PATH.fullmatch(words[0]) and not _exists(page, words[0]))
    ):
        return None  # a program on the line, one that the page makes, or a path that is reported as missing already
    place = next((place for place in (ROOT / words[0], page.parent / words[0]) if place.is_file()), None)
    return _flag_fault(place, words[1:]) if place else f"no script {words[0]}"


def _flag_fault(script: Path, words: Sequence[str]) -> str | None:
    source = script.read_text(encoding="utf-8")
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((f"{script.name} has no flag {flag}" for flag in given if f'"{flag}"' not in source), None)


class _ParsedError(Exception):
    """The words were parsed; nothing ran."""


def parse_fault(words: Sequence[str], *, only_flags: bool = False) -> str | None:
    """Return why the program refuses these words, by its own parser; None if it takes them."""
    real, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse(parser: argparse.ArgumentParser, *given: object, **named: object) -> object:
        nonlocal depth
        if not parser.add_help:  # one that only looks for a flag before the real parser is made
            return real(parser, *given, **named)  # type: ignore[call-overload]
        if depth == 0 and only_flags:
            known = set(flags.flags_of(parser))
            raise _ParsedError(", ".join(sorted(set(_FLAG.findall(" ".join(words))) - known - {"--help"})))
        depth += 1
        result = real(parser, *given, **named)  # type: ignore[call-overload]
        depth -= 1
        if depth == 0:
            raise _ParsedError(" ".join(result[1]))
        return result

    said = io.StringIO()
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse), contextlib.redirect_stderr(said):
        try:
            code = program.main(_with_config(words)) if words else 0
        except _ParsedError as unknown:
            return f"not a flag: {unknown}" if str(unknown) else None
    return (said.getvalue().strip().splitlines() or [f"exit code {code}"])[-1] if code else None


def _with_config(words: Sequence[str]) -> list[str]:
    """Return the words with a config that is there, since some commands read it before they parse."""
    given = list(words)
    for place, word in enumerate(given[:-1]):
        if word == "--config":
            named = ROOT / given[place + 1]
            given[place + 1] = str(named if named.is_file() else ROOT / "configs" / "stdlib.toml")
    return given


def of_inline(page: Path, text: str) -> Iterator[str]:
    """Yield commands, flags, paths and modules in running text that are not there."""
    for code in _INLINE.findall(_FENCE.sub("", text)):
        if (fault := _inline_fault(page, code)) is not None:
            yield f"`{code}`: {fault}"


def _inline_fault(page: Path, code: str) -> str | None:
    words = re.sub(r"[\[\]…]|\\\|\S+", " ", code).split()
    if words[:1] == ["entrenar"]:
        return _mention_fault(words[1:])
    if words[:1] == ["make"] and len(words) == 2:
        return None if _is_target(page, words[1]) else "no such target"
    if _PATH.fullmatch(code):
        return None if _exists(page, code) else "no such file"
    is_dotted = re.fullmatch(r"entrenar(\.\w+)+", code)
    return "no such name" if is_dotted and not resolves(code) else None


def _mention_fault(words: Sequence[str]) -> str | None:
    if not words or words[0].isupper() or words[0].startswith("-"):
        return None
    return parse_fault(words, only_flags=True) if words[0] in program.COMMANDS else f"no command {words[0]}"


def _exists(page: Path, name: str) -> bool:
    pattern = re.sub(r"[A-Z]{3,}", "*", name.rstrip("/")) if not (ROOT / name).exists() else name
    return any(any(root.glob(pattern)) for root in (ROOT, page.parent))


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or a name in one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def of_python(page: Path, text: str) -> Iterator[str]:
    """Yield Python blocks that do not compile, or use a name that the program does not have."""
    for language, block in _FENCE.findall(text):
        if language == "python":
            yield from (f"Python block: {fault}" for fault in _block_faults(block))


def _block_faults(block: str) -> list[str]:
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        return [str(error)]
    return [f"no {name}" for name in _names(tree) if name.startswith("entrenar.") and not resolves(name)]


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"entrenar(\.\w+)+", ast.unparse(node)):
            yield ast.unparse(node)


def main(names: Sequence[str]) -> int:
    """Print the faults of all pages, or of those named; return 1 if there are any."""
    found = [(page, fault) for page in ([Path(n).resolve() for n in names] or pages()) for fault in faults(page)]
    for page, fault in found:
        print(f"{page.relative_to(ROOT)}: {fault}")  # noqa: T201 - the checker is also a command
    print(f"{len(found)} faults in {len(pages())} pages")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Repeated code: windows of normalized tokens that occur in more than one place.

Comments, docstrings, imports and layout are left out. A name that the file binds (a variable, a parameter) becomes a
placeholder, so that a copy with other variables is found; attributes, called functions, keyword arguments and literals
stay, so that two calls of one function with other arguments are no clone. A window in which few words remain is a
table and does not count.
"""

import ast
import io
import keyword
import tokenize
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrenar.quality.debt.formula import CLONE_TOKENS, CLONE_WORDS

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # from Python 3.12 on an f-string is several tokens
_FSTRING_END = getattr(tokenize, "FSTRING_END", None)
_VARIABLE = zlib.crc32(b"\0variable")


@dataclass(frozen=True)
class Windows:
    """A file's windows: a hash for each start (0: does not count), and the line of each token."""

    hashes: NDArray[np.uint64]
    lines: NDArray[np.uint32]


@dataclass(frozen=True)
class Clone:
    """A stretch of repeated tokens, and a place where its beginning stands again."""

    line: int
    end: int
    tokens: int
    twin: str
    twin_line: int


def read_tokens(text: str, tree: ast.Module) -> tuple[Windows, set[int]]:
    """Return a file's windows and the numbers of its code lines: no blanks, comments or docstrings."""
    docstrings, imports = _lines_of(tree)
    bound = _bound_names(tree)
    checksums, lines, words, code = array("Q"), array("L"), bytearray(), set[int]()
    before, depth = "", 0
    stream = list(_joined_fstrings(text))
    for token, following in zip(stream, [*stream[1:], stream[-1]], strict=True):
        line = token.start[0]
        if token.type in _LAYOUT or line in docstrings:
            continue
        code.update(range(line, token.end[0] + 1))
        if line in imports:
            continue
        is_name = token.type == tokenize.NAME
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        is_variable = is_name and token.string in bound and _is_plain(token.string, before, following.string, depth)
        checksums.append(_VARIABLE if is_variable else zlib.crc32(token.string.encode("utf-8", "surrogatepass")))
        lines.append(line)
        words.append(is_name and not is_variable)
        before = token.string
    hashes = _window_hashes(np.array(checksums, np.uint64), np.frombuffer(words, np.uint8))
    return Windows(hashes, np.array(lines, np.uint32)), code


def _is_plain(name: str, before: str, after: str, depth: int) -> bool:
    """Return whether a bound name stands alone: no attribute, no call, no keyword argument."""
    return not keyword.iskeyword(name) and before not in (".", "def", "class") and after != "(" and (
        after != "=" or depth == 0
    )  # fmt: skip


def _joined_fstrings(text: str) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens; an f-string is one token whatever Python reads it."""
    start: tuple[int, int] | None = None
    depth, lines = 0, text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if _FSTRING_START is None or (start is None and token.type != _FSTRING_START):
            yield token
            continue
        start = start or token.start
        depth += (token.type == _FSTRING_START) - (token.type == _FSTRING_END)
        if depth == 0:
            rows = lines[start[0] - 1 : token.end[0]]
            rows[-1] = rows[-1][: token.end[1]]
            rows[0] = rows[0][start[1] :]
            yield tokenize.TokenInfo(tokenize.STRING, "".join(rows), start, token.end, token.line)
            start = None


def _lines_of(tree: ast.Module) -> tuple[set[int], set[int]]:
    """Return the lines of docstrings, and those of imports."""
    docstrings, imports = set[int](), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return docstrings, imports


def _bound_names(tree: ast.Module) -> set[str]:
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def _window_hashes(checksums: NDArray[np.uint64], words: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hash of each window, sum of c[j] B^(start - j) modulo 2^64, or 0 where it has too few words."""
    count = len(checksums) - CLONE_TOKENS + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    falling = np.cumprod(np.full(len(checksums), _INVERSE, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(checksums * falling, dtype=np.uint64)])
    rising = np.cumprod(np.full(count, _BASE, np.uint64))
    hashes: NDArray[np.uint64] = (sums[CLONE_TOKENS:] - sums[:count]) * rising
    seen = np.concatenate([np.zeros(1, np.int64), np.cumsum(words, dtype=np.int64)])
    hashes[seen[CLONE_TOKENS:] - seen[:count] < CLONE_WORDS] = 0
    return hashes


def find(files: Mapping[str, Windows]) -> dict[str, list[Clone]]:
    """Return each file's repeated stretches: windows that stand elsewhere without overlap, joined where they touch."""
    names = sorted(files)
    if not names:
        return {}
    hashes = np.concatenate([files[name].hashes for name in names])
    owner = np.repeat(np.arange(len(names)), [len(files[name].hashes) for name in names])
    start = np.concatenate([np.arange(len(files[name].hashes)) for name in names])
    order = np.argsort(hashes, kind="stable")
    order = order[hashes[order] != 0]
    own, twin = (order[index] for index in _twins(hashes[order], owner[order], start[order]))
    stretches: dict[str, list[_Stretch]] = {name: [] for name in names}
    places = np.lexsort((start[own], owner[own]))
    for mine, other in zip(own[places], twin[places], strict=True):
        found, first = stretches[names[owner[mine]]], int(start[mine])
        if found and first <= found[-1].end:
            found[-1].end = first + CLONE_TOKENS
        else:
            twin_name = names[owner[other]]
            found.append(_Stretch(first, first + CLONE_TOKENS, twin_name, int(files[twin_name].lines[start[other]])))
    return {name: [stretch.clone(files[name].lines) for stretch in found] for name, found in stretches.items()}


@dataclass
class _Stretch:
    """Tokens from `first` to before `end`, growing while windows touch it."""

    first: int
    end: int
    twin: str
    twin_line: int

    def clone(self, lines: NDArray[np.uint32]) -> Clone:
        """Return the stretch in lines."""
        first, last = int(lines[self.first]), int(lines[self.end - 1])
        return Clone(first, last, self.end - self.first, self.twin, self.twin_line)


def _twins(
    hashes: NDArray[np.uint64], owner: NDArray[np.int64], start: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, of windows sorted by hash and place, those that have a twin, and the twin of each.

    If any window of a group lies apart from one, then the group's first or its last does, since a group is sorted.
    """
    _, first, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    last = first + counts - 1
    index = np.arange(len(hashes))

    def is_apart(other: NDArray[np.int64]) -> NDArray[np.bool_]:
        apart: NDArray[np.bool_] = (owner != owner[other]) | (np.abs(start - start[other]) >= CLONE_TOKENS)
        return apart

    heads, tails = first[inverse], last[inverse]
    twin = np.where(is_apart(heads), heads, np.where(is_apart(tails), tails, -1))
    return index[twin >= 0], twin[twin >= 0]

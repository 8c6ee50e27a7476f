"""Make a fine-tuning task out of Python's own sources: from a function's code to the first line of its docstring.

    python examples/finetune_docstrings/make_rows.py --out corpora/docstrings

Nothing is downloaded. Held-out rows come from other source files than the training rows, so that a docstring which
two functions of one module share is never on both sides.
"""

import argparse
import ast
import hashlib
import json
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from entrenar.data.corpus.settings import SourceConfig
from entrenar.data.corpus.sources import STDLIB, find_sources

MIN_LINE, MAX_LINE, MAX_CODE = 12, 80, 600
HELD_OUT_SHARE = 0.1


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield code without docstring, and the docstring's first line, of each function that is neither long nor bare."""
    lines = source.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        docstring = node.body[0]
        kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(kept)).strip()
        if MIN_LINE <= len(summary) <= MAX_LINE and len(code) <= MAX_CODE:
            yield code, summary


def is_held_out(name: str) -> bool:
    """Decide by the file's name, so that a file is wholly on one side."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < HELD_OUT_SHARE * 2**32


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("corpora/docstrings"))
    out = arguments.parse_args().out
    rows: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for file in find_sources([STDLIB], SourceConfig())[0].files:
        try:
            found = list(functions(file.path.read_text("utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        side = rows["test" if is_held_out(file.name) else "train"]
        side.update(found)
    for code in rows["train"].keys() & rows["test"].keys():
        del rows["train"][code]
    out.mkdir(parents=True, exist_ok=True)
    for name, pairs in rows.items():
        lines = (
            json.dumps({"prompt": f"{code}\n# Docstring:", "completion": f" {line}"}) for code, line in pairs.items()
        )
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}.jsonl: {len(pairs):,} functions")


if __name__ == "__main__":
    main()

"""Generate a faster program from a plain one, with a source map that leads back.

    python transpile.py finetune_tiny.py --output generated.py --source-map generated.map.json

Constants of the module go in where they are used, loops over a constant range are unrolled, docstrings and annotations
go away. What is decided is logged to standard error, a line for the decision and a line for its result. The map is of
version 1: `entrenar trace run --transpiler-map` shows the lines of the source.
"""

import argparse
import ast
import copy
import json
import sys
from pathlib import Path
from typing import Any

MOST_ROUNDS = 8


def decide(name: str, question: dict[str, Any], answer: dict[str, Any]) -> None:
    """Log a decision and its result, as `--trace-transpiler-decisions` reads them."""
    print(f"[DECISION] optimization::{name} input={json.dumps(question)}", file=sys.stderr)
    print(f"[RESULT] {name} = {json.dumps(answer)}", file=sys.stderr)


class Generator(ast.NodeTransformer):
    """Rewrites a module; each node that is put in keeps the line of the node that it came from."""

    def __init__(self, constants: dict[str, ast.Constant]) -> None:
        self.constants = constants
        self.uses = dict.fromkeys(constants, 0)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put a constant in where it is read."""
        if node.id not in self.constants or not isinstance(node.ctx, ast.Load):
            return node
        self.uses[node.id] += 1
        return ast.copy_location(ast.Constant(self.constants[node.id].value), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Drop docstring and annotations."""
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.copy_location(ast.Pass(), node)]
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        """Drop the annotation of a variable."""
        self.generic_visit(node)
        return node.value and ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        """Unroll a loop over a short constant range that nothing leaves early."""
        self.generic_visit(node)
        rounds = constant_rounds(node)
        if rounds is None:
            return node
        leaves = any(isinstance(inner, ast.Break | ast.Continue) for inner in ast.walk(node))
        is_unrolled = rounds <= MOST_ROUNDS and not leaves and not node.orelse
        decide("unroll_loop", {"line": node.lineno, "rounds": rounds}, {"unrolled": is_unrolled})
        if not is_unrolled:
            return node
        body: list[ast.stmt] = []
        for number in range(rounds):
            body.append(ast.copy_location(ast.Assign([copy.deepcopy(node.target)], ast.Constant(number)), node))
            body += copy.deepcopy(node.body)
        return body


def constant_rounds(node: ast.For) -> int | None:
    """Return n of `for … in range(n)` with a whole number n, else None."""
    match node.iter:
        case ast.Call(func=ast.Name("range"), args=[ast.Constant(value=int(rounds))], keywords=[]):
            return rounds
        case _:
            return None


def transpile(source: str, source_file: str, generated_file: str) -> tuple[str, dict[str, Any]]:
    """Return the generated program and its map."""
    module = ast.parse(source, source_file)
    constants = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
        if isinstance(node.value, ast.Constant)
    }
    if ast.get_docstring(module) is not None:
        module.body = module.body[1:]
    generator = Generator(constants)
    written = ast.fix_missing_locations(generator.visit(module))
    for name, uses in generator.uses.items():
        decide("inline_constant", {"name": name, "line": constants[name].lineno}, {"uses": uses})
    text = ast.unparse(written) + "\n"
    content = {
        "version": 1,
        "source_language": "python",
        "target_language": "python",
        "mappings": mappings(written, ast.parse(text), source_file, generated_file),
    }
    return text, content


def mappings(written: ast.AST, read: ast.AST, source_file: str, generated_file: str) -> list[dict[str, Any]]:
    """Pair each statement with itself in the text that was generated: the trees have the same shape."""
    found: list[dict[str, Any]] = []

    def walk(mine: ast.AST, theirs: ast.AST, function: str | None) -> None:
        if isinstance(mine, ast.FunctionDef):
            function = mine.name
        if isinstance(mine, ast.stmt) and isinstance(theirs, ast.stmt):
            entry = {
                "generated_file": generated_file, "generated_line": theirs.lineno,
                "original_file": source_file, "original_line": mine.lineno, "original_function": function,
            }  # fmt: skip
            found.append(entry)
        for one, other in zip(ast.iter_child_nodes(mine), ast.iter_child_nodes(theirs), strict=True):
            walk(one, other, function)

    walk(written, read, None)
    return found


def main() -> None:
    """Read, generate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source-map", type=Path, required=True)
    chosen = parser.parse_args()
    text, content = transpile(chosen.source.read_text(encoding="utf-8"), str(chosen.source), str(chosen.output))
    chosen.output.write_text(text, encoding="utf-8")
    chosen.source_map.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

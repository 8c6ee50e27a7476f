"""Trace the kernels of torch.compile back to the lines of the model.

With TORCH_COMPILE_DEBUG=1 Inductor leaves, for each graph, the code that it runs (`output_code.py`), the graph with the
model's lines, before and after its own passes (`fx_graph_readable.py`, `fx_graph_transformed.py`), and, for a forward
graph, which kernel came from which nodes. A line that calls a kernel is mapped to the model's line that most nodes of
the kernel came from; the note names all lines.

A backward graph has no table of nodes. There the comment above a call names them; and where a fused kernel has no
comment, the kernels that read its results have one, which names the nodes behind these results.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrenar.errors import FormatError
from entrenar.files import read_json, sha256_file
from entrenar.trace.source_map import Origin, SourceMap

CODE, NODES = "output_code.py", "inductor_provenance_tracking_node_mappings.json"
GRAPHS = ("fx_graph_readable.py", "fx_graph_transformed.py")
_FILE_COMMENT = re.compile(r"\s*# File: (?P<file>.+):(?P<line>\d+) in (?P<function>[\w.<>]+), code: ")
_NODE = re.compile(r"\s*(?P<node>\w+)(?:: \"[^\"]*\")? = ")
_HANDLE = re.compile(r"\s*# \[Provenance debug handles\] (?P<handle>\S+)")
_NODES_COMMENT = re.compile(r"\s*# Topologically Sorted Source Nodes: \[(?P<nodes>[^\]]*)\]")
_KERNEL_CALL = re.compile(r"\s+(?P<kernel>(?:cpp_|triton_|extern_kernels\.)\w+)(?:\.run)?\((?P<arguments>.*)\)$")
_ASSIGNED = re.compile(r"\s+(?P<buffer>buf\d+) = ")
_RETURN = re.compile(r"\s+return \(")


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel in generated code: its line, and the lines of the model it computes, the main one first."""

    kernel: str
    line: int
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class _Call:
    """A call as the code and the comments above it show it: nodes behind it, buffers made for it, its arguments."""

    kernel: str
    line: int
    nodes: tuple[str, ...]
    made: frozenset[str]
    arguments: frozenset[str]


def compiled_map(folder: Path) -> SourceMap:
    """Map the generated code under a debug folder, or a cache, of torch.compile.

    Raises: FormatError if there is none.
    """
    maps = SourceMap("python")
    for code in sorted(folder.rglob(CODE)):
        # Inductor runs X.py and describes it in X.debug; in a debug folder, the code it runs is known by its content.
        cached = code.parent.with_suffix(".py")
        generated = str(cached if code.parent.suffix == ".debug" and cached.is_file() else code)
        calls = kernel_calls(code.parent)
        for call in calls:
            maps.add(generated, call.line, _main_origin(call))
            maps.functions[call.kernel] = str(_main_origin(call))
        if calls:
            maps.add(generated, _end_of_calls(code), None)
            maps.twins[sha256_file(code)] = generated
    if not maps.lines:
        raise FormatError(
            f"{folder} must hold what torch.compile wrote with TORCH_COMPILE_DEBUG=1, but no {CODE} in it calls a "
            "kernel of known origin"
        )
    return maps


def _main_origin(call: KernelCall) -> Origin:
    main = call.origins[0]
    places = ", ".join(f"{Path(origin.file).name}:{origin.line}" for origin in call.origins)
    return Origin(main.file, main.line, main.function, f"{call.kernel} computes {places}")


def kernel_calls(graph: Path) -> list[KernelCall]:
    """Return the kernels that a graph's code calls, in order; one whose origin is unknown is left out.

    Raises: FormatError for a table of nodes that is none; FileNotFoundError if the graph is not there.
    """
    origins = _origins_of_nodes(graph)
    calls = list(_calls(graph / CODE, _nodes_of_kernels(graph / NODES)))
    known = []
    for index, call in enumerate(calls):
        nodes = call.nodes or _nodes_of_readers(call, calls[index + 1 :])
        counts = Counter(origins[node] for node in nodes if node in origins)
        places = sorted(counts, key=lambda origin: (-counts[origin], origin.file, origin.line))
        if places:
            known.append(KernelCall(call.kernel, call.line, tuple(places)))
    return known


def _origins_of_nodes(graph: Path) -> dict[str, Origin]:
    """Read `# File: model.py:22 in forward, code: …` above the nodes that it is about."""
    origins = {}
    for name in GRAPHS:
        current = None
        for text in (graph / name).read_text(encoding="utf-8").splitlines():
            comment, node = _FILE_COMMENT.match(text), _NODE.match(text)
            if comment is not None:
                current = Origin(comment["file"], int(comment["line"]), comment["function"])
            elif node is not None and current is not None:
                origins[node["node"]] = current
    return origins


def _nodes_of_kernels(path: Path) -> Mapping[str, Sequence[str]]:
    if not path.is_file():
        return {}
    content = read_json(path)
    table = content.get("cppCodeToPost") if isinstance(content, dict) else None
    if not isinstance(table, dict):
        raise FormatError(f"{path}: cppCodeToPost must be an object, as torch 2.13 writes it; compile the model again")
    return table


def _calls(code: Path, nodes_of: Mapping[str, Sequence[str]]) -> Iterator[_Call]:
    handle, nodes, made = "", "", set[str]()
    for number, text in enumerate(code.read_text(encoding="utf-8").splitlines(), 1):
        if match := _HANDLE.match(text):
            handle = match["handle"]
        elif match := _NODES_COMMENT.match(text):
            nodes = match["nodes"]
        elif match := _ASSIGNED.match(text):
            made.add(match["buffer"])
        elif match := _KERNEL_CALL.match(text):
            # Until torch 2.12 the table has the kernel's bare name; since, a handle with the number of the call.
            listed = (
                nodes_of.get(handle) or nodes_of.get(match["kernel"]) or [part.strip() for part in nodes.split(",")]
            )
            arguments = frozenset(re.findall(r"\w+", match["arguments"]))
            yield _Call(match["kernel"], number, tuple(filter(None, listed)), frozenset(made), arguments)
            handle, nodes, made = "", "", set()


def _nodes_of_readers(call: _Call, later: Sequence[_Call]) -> list[str]:
    results = call.made & call.arguments
    return [node for reader in later if results & reader.arguments for node in reader.nodes]


def _end_of_calls(code: Path) -> int:
    """Return the line behind the last kernel: the benchmark that Inductor appends is nobody's line."""
    lines = code.read_text(encoding="utf-8").splitlines()
    return next((number for number, text in enumerate(lines, 1) if _RETURN.match(text)), len(lines) + 1)

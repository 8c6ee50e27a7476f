"""Source maps for what writes none: exported notebooks, Cython, and (in `compiled_code`) torch.compile.

- A notebook that was exported (`jupyter nbconvert --to script`) holds the lines of its code cells in their order, so
  each cell is found again in the script, line for line.
- Cython's C file quotes each line of the .pyx above its C code, and may carry #line directives.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from entrenar.errors import DataError, FormatError
from entrenar.files import read_json
from entrenar.trace.compiled_code import compiled_map
from entrenar.trace.source_map import Origin, SourceMap, load_map, merged


def load_maps(paths: Sequence[Path]) -> SourceMap:
    """Read maps of any kind into one: JSON (versions 1 and 3), .ipynb, Cython's .c, a folder of torch.compile.

    Raises: DataError for a path that is not there; FormatError, see `merged`.
    """
    return merged([(str(path), _load(path)) for path in paths])


def _load(path: Path) -> SourceMap:
    if not path.exists():
        raise DataError(f"a source map must be a file or a folder, and there is none at {path}")
    if path.is_dir():
        return compiled_map(path)
    if path.suffix == ".ipynb":
        return notebook_map(path, path.with_suffix(".py"))
    if path.suffix in (".c", ".cpp", ".cxx", ".cc"):
        return c_map(path)
    return load_map(path)


# ---- notebooks ----


def notebook_map(notebook: Path, script: Path) -> SourceMap:
    """Map an exported script to the cells of its notebook: `train.ipynb#cell3:2`, cells numbered from 1.

    Raises: FormatError if a cell of the notebook is not in the script, as after an edit.
    """
    content = read_json(notebook)
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list):
        raise FormatError(f"{notebook}: cells must be a list; this is no notebook of format 4")
    lines = script.read_text(encoding="utf-8").splitlines()
    maps = SourceMap("python")
    position = 0
    code = (cell for cell in cells if isinstance(cell, dict) and cell.get("cell_type") == "code")
    for number, cell in enumerate(code, 1):
        source = cell.get("source", "")
        wanted = ("".join(source) if isinstance(source, list) else str(source)).splitlines()
        position = _map_cell(maps, notebook, script, (number, wanted), lines, position)
    return maps


def _map_cell(
    maps: SourceMap, notebook: Path, script: Path, cell: tuple[int, list[str]], lines: list[str], position: int
) -> int:
    """Map one cell's lines; return where the script goes on behind it."""
    number, wanted = cell
    for index, text in enumerate(wanted, 1):
        # An export turns %magic and !shell into calls, so such a line is not found by its text; the next one is.
        is_code = bool(text.strip()) and not text.lstrip().startswith(("%", "!", "?"))
        if not is_code:
            continue
        found = next((at for at in range(position, len(lines)) if lines[at] == text), None)
        if found is None:
            raise FormatError(
                f"{script} must be the export of {notebook}, but line {index} of code cell {number} is not in it: "
                f"{text!r:.60}; export the notebook again"
            )
        maps.add(str(script.resolve()), found + 1, Origin(f"{notebook}#cell{number}", index))
        position = found + 1
    return position


# ---- C that carries the lines of its source ----

_LINE_DIRECTIVE = re.compile(r'\s*#\s*(?:line\s+)?(?P<line>\d+)\s+"(?P<file>[^"]+)"')
_CYTHON_COMMENT = re.compile(r'\s*/\* "(?P<file>[^"]+)":(?P<line>\d+)$')


def c_map(path: Path) -> SourceMap:
    """Map a C file by its #line directives and by Cython's quotations.

    Raises: FormatError if it has neither.
    """
    maps = SourceMap("c")
    text = path.read_text(encoding="utf-8", errors="replace")
    in_quotation: Origin | None = None
    for number, line in enumerate(text.splitlines(), 1):
        directive = _LINE_DIRECTIVE.match(line)
        quotation = _CYTHON_COMMENT.match(line)
        if directive is not None:
            maps.add(path.name, number + 1, Origin(directive["file"], int(directive["line"])))
        elif quotation is not None:
            in_quotation = Origin(quotation["file"], int(quotation["line"]))
            maps.language = "cython"
        elif in_quotation is not None and "*/" in line:
            maps.add(path.name, number + 1, in_quotation)
            in_quotation = None
    if not maps.lines:
        raise FormatError(f"{path} must carry #line directives or Cython's quotations, and has neither")
    return maps

"""Find the trace that a user means: a file, the folder of a run, or the newest of a folder of traces."""

from pathlib import Path

from entrenar.errors import DataError

SUFFIX = ".sqlite"


def trace_file(path: Path) -> Path:
    """Return the trace file at `path`: itself, or the newest in the folder.

    Raises: DataError if there is none.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise DataError(f"{path} must hold a trace (*{SUFFIX}), and holds none; make one with `entrenar trace run`")
        return found[-1]
    return path

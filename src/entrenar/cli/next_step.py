"""What to do next, as a command with the real paths in it: the last line of a command that has made something."""

import shlex
from pathlib import Path


def resume_command(command: str, run_dir: Path) -> str:
    """Return the command that continues a run from its own config."""
    named = f"entrenar {command} --resume --name {shlex.quote(run_dir.name)}"
    return named if str(run_dir.parent) == "runs" else f"{named} --runs-dir {shlex.quote(str(run_dir.parent))}"


def generate_command(model: Path) -> str:
    """Return the command that lets a model write."""
    return f"entrenar generate {shlex.quote(str(model))} --prompt TEXT"


def tell_next(command: str) -> None:
    """Print the command that comes next."""
    print(f"Next: {command}")

"""Write the types of the library's keyword options, `src/entrenar/options.py`, from the config models.

python benchmarks/option_types.py           write the file
python benchmarks/option_types.py --check   fail if it is stale
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from entrenar.config import FinetuneConfig, RunConfig, options
from entrenar.infer import GenerateConfig

OUT = Path(__file__).parents[1] / "src" / "entrenar" / "options.py"
HEAD = '''"""The keyword options of the library, for type checkers and editors; written by `benchmarks/option_types.py`.

Each is an option of the config models of the same name, whose docstrings say what it does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

AnyPath = str | Path
'''


def typed(annotation: Any) -> str:
    """Return the annotation of a caller's value: a path may be text, a list any sequence, a table any mapping."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(typed(part) for part in inner if part is not NoneType)) + (
            " | None" if NoneType in inner else ""
        )
    if origin is tuple:
        item = typed(inner[0])
        return f"{item} | Sequence[{item}]" if item in ("str", "AnyPath") else f"Sequence[{item}]"
    if origin is dict:
        return f"Mapping[{', '.join(map(typed, inner))}]"
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    if annotation is Path:
        return "AnyPath"
    return annotation.__name__ if annotation in (str, int, float, bool) else "Any"


def fields(model: type) -> dict[str, str]:
    """Return the options of a config by name."""
    return {option.path[-1]: typed(option.field.annotation) for option in options(model)}


def of_class(name: str, base: str, about: str, rows: dict[str, str]) -> Iterator[str]:
    """Yield the lines of one class."""
    yield from ("", "", f"class {name}({base}, total=False):", f'    """{about}"""', "")
    yield from (f"    {key}: {kind}" for key, kind in rows.items())


def text() -> str:
    """Return the file."""
    runs, tuning = fields(RunConfig), fields(FinetuneConfig)
    shared = {key: kind for key, kind in runs.items() if tuning.get(key) == kind}
    own = [{key: kind for key, kind in one.items() if key not in shared} for one in (runs, tuning)]
    generation = {name: typed(field.annotation) for name, field in GenerateConfig.model_fields.items()}
    lines = [
        HEAD.rstrip("\n"),
        *of_class("TrainingOptions", "TypedDict", "Options of every training run.", shared),
        *of_class("PretrainOptions", "TrainingOptions", "Options of `entrenar.pretrain`.", own[0]),
        *of_class("FinetuneOptions", "TrainingOptions", "Options of `entrenar.finetune`.", own[1]),
        *of_class("PlanOptions", "PretrainOptions, FinetuneOptions", "Options of `entrenar.plan`.", {}),
        *of_class("GenerateOptions", "TypedDict", "Options of `entrenar.generate`.", generation),
    ]
    ruff = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"]
    return subprocess.run(ruff, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Write the file, or compare it."""
    if "--check" in sys.argv[1:]:
        return int(OUT.read_text(encoding="utf-8") != text())
    OUT.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

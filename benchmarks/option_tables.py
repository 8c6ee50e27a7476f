"""The reference of all options, from the config models themselves."""

from collections.abc import Iterator
from itertools import groupby

from figures import rows

from entrenar.config import FinetuneConfig, Option, RunConfig, options


def options_of_runs() -> str:
    """Every option of `entrenar train`, by table of the file."""
    return "\n".join(_tables(list(options(RunConfig))))


def options_of_finetuning() -> str:
    """What `entrenar finetune` has beyond the options of `entrenar train`."""
    known = {option.key: _row(option) for option in options(RunConfig)}
    return "\n".join(_tables([o for o in options(FinetuneConfig) if known.get(o.key) != _row(o)]))


def _tables(found: list[Option]) -> Iterator[str]:
    for table, held in groupby(found, lambda option: option.path[0] if len(option.path) > 1 else ""):
        yield f"### {f'[{table}]' if table else 'Top level'}\n"
        yield rows(["option", "default", "meaning"], [_row(option) for option in held])


def _row(option: Option) -> list[str]:
    default = None if option.field.is_required() else option.field.get_default(call_default_factory=True)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    meaning = " ".join((option.field.description or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return [f"`{option.flag}`", f"`{shown}`" if shown else "", meaning]

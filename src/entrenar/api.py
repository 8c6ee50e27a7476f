"""The library in eight names: `import entrenar` offers them, and loads torch when the first is used.

    run = entrenar.pretrain("configs/stdlib.toml", max_steps=200, lr=1e-3)
    model, tokenizer = entrenar.load(run.run_dir)
    print(entrenar.generate(model, tokenizer, ["import os"], max_new_tokens=40)[0])

Options are those of the config file, by their own name (`lr`) or by table and name (`{"optim.lr": 1e-3}`); values are
Python's, and text for a number is refused. `entrenar.options` has their types. `entrenar.train` is the package of the
training loop, hence the name `pretrain`. Everything behind these names (`entrenar.recipe`, `entrenar.model`,
`entrenar.train` …) may be used as well.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from pydantic import BaseModel

from entrenar import notebook, recipe
from entrenar.arguments import as_arguments
from entrenar.config import AnyConfig, FinetuneConfig, RunConfig, options
from entrenar.config_file import ConfigFile, arguments_of, load_config, load_finetune_config
from entrenar.data import Tokenizer
from entrenar.errors import ConfigError, EntrenarError
from entrenar.infer import Evaluation, GenerateConfig, complete
from entrenar.interop import convert as converting
from entrenar.interop.source import open_source
from entrenar.model import Llama, LlamaConfig
from entrenar.options import AnyPath, FinetuneOptions, GenerateOptions, PlanOptions, PretrainOptions
from entrenar.planning import RunPlan, plan_run, sized_for_corpus
from entrenar.recipe import FinetuneReport, Observer, TrainReport
from entrenar.runs import RunFolder
from entrenar.synonyms import elsewhere

__all__ = ["LlamaConfig", "convert", "evaluate", "finetune", "generate", "load", "plan", "pretrain"]

_OF_FINETUNING = ("model", "method", "data")


def pretrain(
    config: AnyPath | RunConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_changes: bool = False,
    observer: Observer | None = None,
    **overrides: Unpack[PretrainOptions],
) -> TrainReport:
    """Pre-train a model by a config file, with `overrides` over it.

    `resume` without a config reads that of the run `name`. Without an `observer`, a notebook shows the progress.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingHalted, MachineError.
    """
    with _speaking_of_arguments(RunConfig):
        if config is None and resume:
            config = _config_of(overrides, "run")
        config = _run_config(config, overrides)
        with _observed(config.name, observer) as observing:
            return recipe.train(
                config, resume=resume, overwrite=overwrite, allow_changes=allow_config_changes,
                adds_time="max_time_s" in overrides, observer=observing,
            )  # fmt: skip


def finetune(
    config: AnyPath | FinetuneConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_changes: bool = False,
    observer: Observer | None = None,
    **overrides: Unpack[FinetuneOptions],
) -> FinetuneReport:
    """Fine-tune `model="FOLDER"` on `data="FILE"` by `method="full"`, `"lora"` or `"qlora"`; see `pretrain`.

    Raises:
        ConfigError, DataError, FormatError, CheckpointError, TrainingHalted, MachineError.
    """
    with _speaking_of_arguments(FinetuneConfig):
        if config is None and resume:
            config = _config_of(overrides, "finetune")
        config = _finetune_config(config, overrides)
        with _observed(config.name, observer) as observing:
            return recipe.finetune(
                config, resume=resume, overwrite=overwrite, allow_changes=allow_config_changes,
                adds_time="max_time_s" in overrides, observer=observing,
            )  # fmt: skip


def load(path: AnyPath, *, dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer]:
    """Load model and tokenizer from a run, a checkpoint, a model or adapter folder, a .gguf or a .bin.

    Raises:
        DataError: there is no model, or it has no tokenizer; FormatError: the model is damaged.
    """
    with _speaking_of_arguments():
        return recipe.open_model(Path(path), dtype=dtype)


def generate(
    model: Llama, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: Unpack[GenerateOptions]
) -> list[str]:
    """Continue each prompt; options are those of `GenerateConfig` (max_new_tokens, temperature, top_p, seed, stop …).

    Returns: the text after each prompt, in order.

    Raises:
        ConfigError: an option does not exist or has a wrong value.
    """
    with _speaking_of_arguments(GenerateConfig):
        config = arguments_of(GenerateConfig, _given(GenerateConfig, options))
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        return [completion.text for completion in complete(model, tokenizer, asked, config)]


def evaluate(path: AnyPath, corpus: AnyPath, *, batch_size: int = 8, seq_len: int | None = None) -> Evaluation:
    """Measure a model on the held-out split of a corpus: loss, perplexity, bits per byte.

    Raises:
        ConfigError, DataError, FormatError.
    """
    with _speaking_of_arguments(batch_size=False, seq_len=False):
        return recipe.evaluate_model(Path(path), Path(corpus), batch_size=batch_size, seq_len=seq_len)


def plan(config: AnyPath | RunConfig | FinetuneConfig | None = None, **overrides: Unpack[PlanOptions]) -> RunPlan:
    """Predict memory and time of a run before it starts; nothing is loaded and nothing is written.

    It is a fine-tuning run if `model`, `method` or `data` is given, or the config is one of fine-tuning.

    Raises:
        ConfigError, DataError.
    """
    with _speaking_of_arguments(RunConfig, FinetuneConfig):
        if _is_of_finetuning(config, overrides):
            tuning = _finetune_config(config, overrides)
            return plan_run(tuning, recipe.model_folder(tuning.model))
        return plan_run(sized_for_corpus(_run_config(config, overrides)))


def convert(
    source: AnyPath, target: AnyPath, to: Literal["hf", "gguf", "llama2c", "nf4"], *, dtype: str | None = None,
    overwrite: bool = False,
) -> Mapping[str, float]:  # fmt: skip
    """Write a model in another format; the written file is read back by other code before it gets its name.

    Returns: the measured differences, such as "kl" and "dlogit".

    Raises:
        GateFailed: the file is not what it should be; ConfigError, FormatError, DiskFullError.
    """
    with _speaking_of_arguments(to=False, dtype=False):
        path = Path(source)
        opened = open_source(recipe.model_folder(path) if (path / "checkpoints").is_dir() else path)
        wanted = converting.Target(Path(target), to, dtype, can_overwrite=overwrite)
        return converting.convert(opened, wanted).metrics


@contextmanager
def _speaking_of_arguments(*models: type[BaseModel], **names: bool) -> Iterator[None]:
    """Give errors from further in the caller's words; `names` and the options of `models` are what can be passed."""
    asked = {"resume": True, "overwrite": True, "allow_config_changes": True} | names
    for model in models:
        asked |= {option.path[-1]: option.field.annotation is bool for option in options(model)}
    try:
        yield
    except EntrenarError as error:
        said = as_arguments(str(error), asked)
        if said == str(error):
            raise
        raise type(error)(said) from error


@contextmanager
def _observed(name: str, observer: Observer | None) -> Iterator[Observer]:
    """Give the caller's observer, or in a notebook one that shows the progress in place."""
    if observer is not None or not notebook.is_here():
        yield observer or Observer()
        return
    view = notebook.View(name)
    try:
        yield Observer(view.stage, view.record, view.event)
    finally:
        view.close()


def _config_of(overrides: Mapping[str, Any], default_name: str) -> Path:
    """Return the config file of the run that is to be resumed."""
    return RunFolder(Path(overrides.get("runs_dir", "runs")) / overrides.get("name", default_name)).config


def _is_of_finetuning(config: AnyPath | AnyConfig | None, overrides: Mapping[str, Any]) -> bool:
    if isinstance(config, RunConfig | FinetuneConfig):
        return isinstance(config, FinetuneConfig)
    return any(name in overrides for name in _OF_FINETUNING) or ConfigFile.read(_path(config)).is_of_finetuning


def _run_config(config: AnyPath | AnyConfig | None, overrides: Mapping[str, Any]) -> RunConfig:
    if isinstance(config, FinetuneConfig):
        raise ConfigError("pretrain needs a RunConfig, got a FinetuneConfig; pass it to finetune")
    if not isinstance(config, RunConfig):
        return load_config(_path(config), _given(RunConfig, overrides), are_arguments=True)
    _refuse_both(config, overrides)
    return config


def _finetune_config(config: AnyPath | AnyConfig | None, overrides: Mapping[str, Any]) -> FinetuneConfig:
    if isinstance(config, RunConfig):
        raise ConfigError("finetune needs a FinetuneConfig, got a RunConfig; pass it to pretrain")
    if not isinstance(config, FinetuneConfig):
        return load_finetune_config(_path(config), _given(FinetuneConfig, overrides), are_arguments=True)
    _refuse_both(config, overrides)
    return config


def _refuse_both(config: AnyConfig, overrides: Mapping[str, Any]) -> None:
    if overrides:
        kind = type(config).__name__
        raise ConfigError(f"options cannot be given next to a {kind}; set them in it, or give a file")


def _path(config: AnyPath | None) -> Path | None:
    return None if config is None else Path(config)


def _given(model: type[BaseModel], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword options by dotted key.

    Raises: ConfigError for every name that is no option.
    """
    keys = {option.path[-1]: option.key for option in options(model)}
    known = {*keys, *keys.values()}
    faults = [f"{name} is not an option{_nearest(name, known)}" for name in overrides if name not in known]
    if faults:
        raise ConfigError("\n".join(faults))
    return {keys.get(name, name): value for name, value in overrides.items()}


def _nearest(name: str, known: set[str]) -> str:
    if (ours := elsewhere(name, known)) is not None:
        return f"; did you mean {'='.join([ours[0], *map(repr, ours[1:])])}?"
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""

"""The library in eight names: `import entrenar` offers them, and loads torch when the first is used.

    run = entrenar.pretrain("configs/stdlib.toml", max_steps=200, lr=1e-3)
    model, tokenizer = entrenar.load(run.run_dir)
    print(entrenar.generate(model, tokenizer, ["import os"], max_new_tokens=40)[0])

Options are those of the config file, by their own name (`lr`) or by table and name (`{"optim.lr": 1e-3}`); values are
Python's. `entrenar.train` is the package of the training loop, hence the name `pretrain`. Everything behind these names
(`entrenar.recipe`, `entrenar.model`, `entrenar.train` …) may be used as well.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from entrenar import recipe
from entrenar.config import FinetuneConfig, RunConfig, options
from entrenar.config_file import load_config, load_finetune_config
from entrenar.data import Tokenizer
from entrenar.errors import ConfigError
from entrenar.infer import Evaluation, GenerateConfig, complete
from entrenar.interop import convert as converting
from entrenar.interop.source import open_source
from entrenar.model import Llama, LlamaConfig
from entrenar.planning import RunPlan, plan_run
from entrenar.recipe import FinetuneReport, Observer, TrainReport

__all__ = ["LlamaConfig", "convert", "evaluate", "finetune", "generate", "load", "plan", "pretrain"]

AnyPath = str | Path


def pretrain(
    config: AnyPath | RunConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    **overrides: Any,
) -> TrainReport:
    """Pre-train a model by a config file, with `overrides` over it.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingHalted, MachineError.
    """
    return recipe.train(_run_config(config, overrides), resume=resume, overwrite=overwrite, observer=observer)


def finetune(
    config: AnyPath | FinetuneConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    **overrides: Any,
) -> FinetuneReport:
    """Fine-tune `model="FOLDER"` on `data="FILE"` by `method="full"`, `"lora"` or `"qlora"`.

    Raises:
        ConfigError, DataError, FormatError, CheckpointError, TrainingHalted, MachineError.
    """
    if not isinstance(config, FinetuneConfig):
        config = load_finetune_config(_path(config), _flags(FinetuneConfig, overrides))
    elif overrides:
        raise ConfigError("options cannot be given next to a FinetuneConfig; set them in it, or give a file")
    return recipe.finetune(config, resume=resume, overwrite=overwrite, observer=observer)


def load(path: AnyPath, *, dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer]:
    """Load model and tokenizer from a run, a checkpoint, a model or adapter folder, a .gguf or a .bin.

    Raises:
        DataError: there is no model, or it has no tokenizer; FormatError: the model is damaged.
    """
    return recipe.open_model(Path(path), dtype=dtype)


def generate(model: Llama, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: Any) -> list[str]:
    """Continue each prompt; options are those of `GenerateConfig` (max_new_tokens, temperature, top_p, seed, stop …).

    Returns: the text after each prompt, in order.

    Raises:
        ConfigError: an option does not exist or has a wrong value.
    """
    _demand_known(set(GenerateConfig.model_fields), options)
    try:
        config = GenerateConfig(**options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    return [completion.text for completion in complete(model, tokenizer, asked, config)]


def evaluate(path: AnyPath, corpus: AnyPath, *, batch_size: int = 8, seq_len: int | None = None) -> Evaluation:
    """Measure a model on the held-out split of a corpus: loss, perplexity, bits per byte.

    Raises:
        ConfigError, DataError, FormatError.
    """
    return recipe.evaluate_model(Path(path), Path(corpus), batch_size=batch_size, seq_len=seq_len)


def plan(config: AnyPath | RunConfig | FinetuneConfig | None = None, **overrides: Any) -> RunPlan:
    """Predict memory and time of a run before it starts; nothing is loaded and nothing is written.

    Raises:
        ConfigError, DataError.
    """
    return plan_run(config if isinstance(config, FinetuneConfig) else _run_config(config, overrides))


def convert(
    source: AnyPath, target: AnyPath, to: Literal["hf", "gguf", "llama2c", "nf4"], *, dtype: str | None = None,
    overwrite: bool = False,
) -> Mapping[str, float]:  # fmt: skip
    """Write a model in another format; the written file is read back by other code before it gets its name.

    Returns: the measured differences, such as "kl" and "dlogit".

    Raises:
        GateFailed: the file is not what it should be; ConfigError, FormatError, DiskFullError.
    """
    path = Path(source)
    opened = open_source(recipe.model_folder(path) if (path / "checkpoints").is_dir() else path)
    wanted = converting.Target(Path(target), to, dtype, can_overwrite=overwrite)
    return converting.convert(opened, wanted).metrics


def _run_config(config: AnyPath | RunConfig | None, overrides: Mapping[str, Any]) -> RunConfig:
    if not isinstance(config, RunConfig):
        return load_config(_path(config), _flags(RunConfig, overrides))
    if overrides:
        raise ConfigError("options cannot be given next to a RunConfig; set them in it, or give a file")
    return config


def _path(config: AnyPath | Any | None) -> Path | None:
    return None if config is None else Path(config)


def _flags(model: type[BaseModel], overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return keyword options by dotted key, in the text form that the config reads."""
    keys = {option.path[-1]: option.key for option in options(model)}
    _demand_known({*keys, *keys.values()}, overrides)
    return {keys.get(name, name): _text(value) for name, value in overrides.items()}


def _demand_known(known: set[str], given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{unknown[0]} is not an option{hint}")


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return json.dumps([str(item) if isinstance(item, Path) else item for item in value])
    return json.dumps(value)

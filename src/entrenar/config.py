"""A run's settings: the config models of all packages, side by side. `config_file` reads and writes them.

Where an option lives: in the config model of the package whose code acts on it, declared once, with its docstring as
its help. What only `recipe` acts on (a run's name and folder, the device) lives here. A field that a resumed run may
change says so where it is declared (`runs.CHANGEABLE`). Every option is a key of a file's table (`[optim] lr`) and a
flag (`--lr`), so names are unique across the tables.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from entrenar.data import DataConfig, SftConfig
from entrenar.infer import TaskConfig
from entrenar.model import LlamaConfig, PresetName
from entrenar.peft import LoraConfig, QuantizeConfig, TrunkConfig
from entrenar.runs import CHANGEABLE, FIXED
from entrenar.scale import ScaleConfig
from entrenar.train import CheckpointConfig, MonitorConfig, OptimConfig, ScheduleConfig, TrainConfig

if TYPE_CHECKING:
    import torch

_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"


class RunConfig(BaseModel):
    """All settings of a pre-training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(default="run", pattern=_NAME, json_schema_extra=CHANGEABLE)
    """Name of the run's folder in `runs_dir`."""
    runs_dir: Path = Field(default=Path("runs"), json_schema_extra=CHANGEABLE)
    """Folder of all runs."""
    preset: PresetName | None = None
    """Architecture to start from: tiny, 124m, 1b, 7b, llama3-8b; [model] changes single fields of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes a GPU if there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto measures at the start which is fastest for `precision`, and records it."""
    model: LlamaConfig = LlamaConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(epochs=1)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    scale: ScaleConfig = ScaleConfig()

    @model_validator(mode="after")
    def _windows_fit_the_context(self) -> Self:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len must be <= model.max_seq_len, got {self.data.seq_len} > {self.model.max_seq_len}; "
                "shorten the windows or lengthen the context"
            )
        _refuse_idle_options(self)
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return self.runs_dir / self.name


class FinetuneConfig(BaseModel):
    """All settings of a fine-tuning run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Path = Field(json_schema_extra=CHANGEABLE)
    """Model to fine-tune: a Hugging Face folder, a checkpoint, or a run."""
    method: Literal["full", "lora", "qlora"] = Field(default="lora", json_schema_extra=FIXED)
    """Train every weight, low-rank adapters on frozen weights (lora), or adapters on weights in four bits (qlora)."""
    name: str = Field(default="finetune", pattern=_NAME, json_schema_extra=CHANGEABLE)
    """Name of the run's folder in `runs_dir`."""
    runs_dir: Path = Field(default=Path("runs"), json_schema_extra=CHANGEABLE)
    """Folder of all runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes a GPU if there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto measures at the start which is fastest for `precision`, and records it."""
    sft: SftConfig
    lora: LoraConfig = LoraConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    trunk: TrunkConfig = TrunkConfig()
    task: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig(epochs=3)
    optim: OptimConfig = OptimConfig(lr=2e-4, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    scale: ScaleConfig = ScaleConfig()

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.method == "full" and self.trunk.cache_trunk:
            raise ValueError("trunk.cache_trunk needs frozen layers, but method = full trains all; use lora")
        if self.method != "qlora" and self.lora.lora_init == "loftq":
            raise ValueError(
                f"lora.lora_init = loftq corrects the quantization error, but method = {self.method} quantizes "
                "nothing; set method = qlora"
            )
        if self.trunk.cache_trunk and self.train.compile:
            raise ValueError("trunk.cache_trunk and train.compile cannot be combined; leave one out")
        _refuse_idle_options(self)
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return self.runs_dir / self.name

    @property
    def stored_dtype(self) -> "torch.dtype | None":
        """The dtype in which unquantized weights are loaded; None keeps the file's dtype.

        A frozen base is stored in what it is computed in; weights that learn start from what the file holds.
        """
        import torch  # noqa: PLC0415  # a config is read without it

        if self.train.precision == "float32":
            return torch.float32
        return None if self.method == "full" else torch.bfloat16


AnyConfig = RunConfig | FinetuneConfig
ConfigT = TypeVar("ConfigT", RunConfig, FinetuneConfig)


@dataclass(frozen=True)
class Option:
    """One option of a config: its path and its field."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def flag(self) -> str:
        """The flag for it."""
        return "--" + self.path[-1].replace("_", "-")

    @property
    def key(self) -> str:
        """The dotted key used in messages."""
        return ".".join(self.path)

    @property
    def may_change(self) -> bool:
        """Return whether a resumed run may change the setting."""
        return self.field.json_schema_extra == CHANGEABLE

    @property
    def is_fixed(self) -> bool:
        """Return whether no resumed run may change the setting, because a checkpoint is nothing without it."""
        return self.field.json_schema_extra == FIXED


def options(model: type[BaseModel] = RunConfig, prefix: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield every option of a config model, in order."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from options(inner, (*prefix, name))
        else:
            yield Option((*prefix, name), field)


@dataclass(frozen=True)
class _Need:
    """Options (dotted keys, or tables ending in a dot) that act only if another setting has a certain value."""

    keys: tuple[str, ...]
    remedy: str
    is_met: Callable[[Any], bool]


_NEEDS = (
    _Need(
        ("optim.muon_momentum", "optim.muon_dtype", "optim.muon_excluded"),
        "optimizer = muon",
        lambda c: c.optim.optimizer == "muon",
    ),
    _Need(("schedule.wsd_decay_ratio",), "schedule = wsd", lambda c: c.schedule.schedule == "wsd"),
    _Need(("scale.shard_size",), "shard = hybrid", lambda c: c.scale.shard == "hybrid"),
    _Need(("train.offload_dir", "train.offload_budget_gb"), "offload = disk", lambda c: c.train.offload == "disk"),
)
_FINETUNE_NEEDS = (
    _Need(("lora.",), "method = lora or qlora", lambda c: c.method != "full"),
    _Need(("quantize.",), "method = qlora", lambda c: c.method == "qlora"),
    _Need(("quantize.loftq_turns",), "lora_init = loftq", lambda c: c.lora.lora_init == "loftq"),
    _Need(
        ("trunk.trunk_dir", "trunk.trunk_rows", "trunk.trunk_budget_gb", "trunk.trunk_checks"),
        "cache_trunk = true",
        lambda c: c.trunk.cache_trunk,
    ),
    _Need(("task.metric", "task.max_task_examples"), "task_data", lambda c: c.task.task_data is not None),
)


def idle_options(config: AnyConfig) -> dict[str, str]:
    """Return the dotted keys that have no effect in `config`, each with the setting that it needs."""
    needs = _NEEDS if isinstance(config, RunConfig) else (*_NEEDS, *_FINETUNE_NEEDS)
    unmet = [need for need in reversed(needs) if not need.is_met(config)]
    return {
        option.key: need.remedy
        for option in options(type(config))
        for need in unmet
        if any(option.key == key or (key.endswith(".") and option.key.startswith(key)) for key in need.keys)
    }


def _refuse_idle_options(config: AnyConfig) -> None:
    """Check that no option without effect is set.

    Raises: ValueError.
    """
    defaults = {name: field.get_default() for name, field in type(config).model_fields.items()}
    for key, remedy in idle_options(config).items():
        table, name = key.split(".")
        if getattr(getattr(config, table), name) != getattr(defaults[table], name):
            raise ValueError(no_effect(key, remedy))


def no_effect(key: str, remedy: str) -> str:
    """Return the message for an option that is set and has no effect."""
    return f"{key} has no effect without {remedy}; set that too, or leave {key.rpartition('.')[2]} out"


def changeable(model: type[BaseModel]) -> frozenset[str]:
    """Return the dotted keys of a config that a resumed run may change."""
    return frozenset(option.key for option in options(model) if option.may_change)


def fixed(model: type[BaseModel]) -> frozenset[str]:
    """Return the dotted keys of a config that no resumed run may change, also if changes are allowed."""
    return frozenset(option.key for option in options(model) if option.is_fixed)


def difference(old: ConfigT, new: ConfigT) -> list[str]:
    """Return a line `key: old -> new` for each option that differs."""
    changed = []
    for option in options(type(old)):
        before, after = (_at(config, option.path) for config in (old, new))
        if before != after:
            changed.append(f"{option.key}: {before!r} -> {after!r}")
    return changed


def _at(config: BaseModel, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value

"""Which conditions a program is to be run under."""

import signal
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from entrenar.errors import ConfigError

WriteError = Literal["EIO", "ENOSPC", "EDQUOT", "EINTR"]


class ChaosConfig(BaseModel):
    """Conditions for a run; what is not given is not limited."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory that may be added after start-up: imports alone take more than most limits."""
    after: str | None = None
    """For a command: start-up is over when a line of its output contains this; the first line when not given."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Wall-clock seconds; then SIGTERM, and SIGKILL two seconds later."""
    cpu_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the time that the program runs; it is stopped for the rest."""
    cpu_s: int | None = Field(default=None, ge=1)
    """Seconds of processor time; then the kernel sends SIGXCPU."""
    disk_bytes: int | None = Field(default=None, ge=4096)
    """Size of a disk of its own that the program finds at `disk`."""
    disk: Path | None = None
    """The folder where that disk is."""
    file_bytes: int | None = Field(default=None, ge=0)
    """Largest file that can be written; writes beyond are short, and then fail with EFBIG."""
    slow_write_s: float | None = Field(default=None, gt=0)
    """Delay before each write, by strace."""
    fail_write: int | None = Field(default=None, ge=1)
    """Number of the write from which on writes fail, by strace."""
    write_error: WriteError = "EIO"
    """The error of such a write."""
    signal: str | None = None
    """A signal to send once, at a random moment within `within_s`."""
    within_s: float = Field(default=10.0, gt=0)
    """Latest moment of the signal."""
    seed: int = 0
    """Seed of the moment."""

    @field_validator("signal")
    @classmethod
    def _is_a_signal(cls, value: str | None) -> str | None:
        if value is not None and value not in signal.Signals.__members__:
            raise ValueError(f"signal must be a name such as SIGKILL or SIGTERM, got {value!r}")
        return value

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if (self.disk_bytes is None) != (self.disk is None):
            raise ValueError("disk_bytes and disk belong together: how large it is, and where the program finds it")
        if self.after is not None and self.memory_bytes is None:
            raise ValueError("after has no effect without memory_bytes; leave it out")
        return self

    @classmethod
    def gentle(cls) -> Self:
        """Return what a laptop does: half a core, half a gigabyte, five minutes."""
        return cls(memory_bytes=512 << 20, timeout_s=300, cpu_share=0.5)

    @classmethod
    def aggressive(cls) -> Self:
        """Return what a bad day does: a quarter of a core, 128 MB, a minute, and SIGTERM when nobody expects it."""
        return cls(memory_bytes=128 << 20, timeout_s=60, cpu_share=0.25, signal="SIGTERM", within_s=30)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the conditions from a TOML file.

        Raises: ConfigError, with every fault.
        """
        try:
            return cls.of(tomllib.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} must be a TOML file of chaos settings: {error}") from error

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Check values.

        Raises: ConfigError, with every fault.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, each['loc'])) or 'chaos'}: {each['msg']}" for each in error.errors())
            raise ConfigError("\n".join(faults)) from error

    def _with(self, **changes: Any) -> Self:
        return self.of({**self.model_dump(exclude_unset=True), **changes})

    def with_memory_limit(self, size_bytes: int) -> Self:
        """Limit the memory that is added after start-up."""
        return self._with(memory_bytes=size_bytes)

    def with_timeout(self, seconds: float) -> Self:
        """Limit the wall-clock time."""
        return self._with(timeout_s=seconds)

    def with_cpu_limit(self, share: float) -> Self:
        """Let the program run for a share of the time."""
        return self._with(cpu_share=share)

    def with_disk_limit(self, size_bytes: int, folder: Path) -> Self:
        """Give the program a small disk of its own at a folder."""
        return self._with(disk_bytes=size_bytes, disk=folder)

    def with_file_limit(self, size_bytes: int) -> Self:
        """Limit the size of a file."""
        return self._with(file_bytes=size_bytes)

    def with_signal(self, name: str, *, within_s: float, seed: int = 0) -> Self:
        """Send a signal at a random moment."""
        return self._with(signal=name, within_s=within_s, seed=seed)

    def with_slow_writes(self, seconds: float) -> Self:
        """Delay each write."""
        return self._with(slow_write_s=seconds)

    def with_failing_writes(self, first: int, error: WriteError = "EIO") -> Self:
        """Let writes fail from a number on."""
        return self._with(fail_write=first, write_error=error)

    def build(self) -> Self:
        """Return the conditions; each step has checked them."""
        return self

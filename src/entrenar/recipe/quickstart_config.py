"""The settings of the first run."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

NUM_STORIES = 12_000
ENOUGH_STEPS = 700  # below this hardly a story keeps its characters
NEW_SEED = 1 << 20  # far from the seeds of training text


class QuickstartConfig(BaseModel):
    """Settings for the first run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    text: Path | None = None
    """A folder or file of your own text to learn from, instead of the stories."""
    minutes: float = Field(default=4.0, gt=0.0)
    """Minutes of training; everything else takes about half a minute more."""
    name: str = "quickstart"
    """The run's folder under `runs_dir`."""
    runs_dir: Path = Path("runs")
    """Where runs are kept."""
    corpora_dir: Path = Path("corpora")
    """Where corpora are kept."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; by default the faster of one and torch's own number, measured at the start."""
    seed: int = Field(default=0, ge=0, lt=NEW_SEED)
    """Seed of the stories, the weights and the order of the data."""

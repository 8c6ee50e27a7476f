"""Run a program under conditions that it will meet one day: little memory, a full disk, a slow core, a kill.

`ChaosConfig` says which, `run` enforces them through the kernel in a child process and says how it ended, and what
this machine could not enforce.
"""

from entrenar.quality.chaos.config import ChaosConfig
from entrenar.quality.chaos.outcome import Outcome
from entrenar.quality.chaos.run import run, run_function

__all__ = ["ChaosConfig", "Outcome", "run", "run_function"]

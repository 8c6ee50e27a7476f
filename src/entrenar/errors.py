"""The errors that entrenar raises at its edges, and the exit code each one means.

    EntrenarError
    ├── ConfigError          2  a setting breaks a rule
    ├── DataError            2  a source, corpus, row or tokenizer cannot be used
    ├── FormatError          2  a file is not what its format promises
    ├── CheckpointError      2  a checkpoint is missing, damaged, or belongs to another run
    ├── TrainingHalted       1  a training alarm stopped the run, because continuing would be wrong
    │   ├── NonFiniteError   1  a loss or gradient is NaN or infinite
    │   └── QualityRegression 1  the code that trains is worse than its baseline
    ├── GateFailed           1  a measured value misses its threshold
    ├── NotMeasured          5  some or all of the requested measurements are missing
    └── MachineError         3  the machine could not do it
        ├── OutOfMemoryError 3  memory ran out
        └── DiskFullError    3  the disk ran out

A message states the rule, the value that broke it, its place, and what to do: the reader has only the message.
"""


class EntrenarError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(EntrenarError):
    """A setting breaks a rule: names key, rule, value, file and line."""


class DataError(EntrenarError):
    """A source, corpus, row or tokenizer cannot be used."""


class FormatError(EntrenarError):
    """A file is not what its format promises: names the file and the field."""


class CheckpointError(EntrenarError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingHalted(EntrenarError):
    """A training alarm stopped the run, because continuing would be wrong."""

    exit_code = 1


class NonFiniteError(TrainingHalted):
    """A loss or gradient is NaN or infinite; no parameter was moved."""


class QualityRegression(TrainingHalted):
    """The code that trains is worse than its baseline."""


class GateFailed(EntrenarError):
    """A measured value misses its threshold."""

    exit_code = 1


class NotMeasured(EntrenarError):
    """Some or all of the requested measurements are missing, so nothing passed or failed."""

    exit_code = 5


class MachineError(EntrenarError):
    """The machine could not do the requested work."""

    exit_code = 3


class OutOfMemoryError(MachineError):
    """Memory ran out."""


class DiskFullError(MachineError):
    """The disk ran out."""

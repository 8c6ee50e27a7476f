"""The exception tree and its exit codes are what the command line promises."""

import pytest

from entrenar import errors

TREE = {
    "EntrenarError": (Exception, 2),
    "ConfigError": (errors.EntrenarError, 2),
    "DataError": (errors.EntrenarError, 2),
    "FormatError": (errors.EntrenarError, 2),
    "CheckpointError": (errors.EntrenarError, 2),
    "TrainingHalted": (errors.EntrenarError, 1),
    "NonFiniteError": (errors.TrainingHalted, 1),
    "QualityRegression": (errors.TrainingHalted, 1),
    "GateFailed": (errors.EntrenarError, 1),
    "NotMeasured": (errors.EntrenarError, 5),
    "MachineError": (errors.EntrenarError, 3),
    "OutOfMemoryError": (errors.MachineError, 3),
    "DiskFullError": (errors.MachineError, 3),
}


def test_every_error_is_in_the_tree() -> None:
    """No exception class exists outside the documented tree."""
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == TREE.keys()


@pytest.mark.parametrize("name", TREE)
def test_parent_and_exit_code(name: str) -> None:
    """Each error has its parent and exit code, and the module's drawing shows it."""
    parent, code = TREE[name]
    error = getattr(errors, name)
    assert error.__bases__ == (parent,)
    assert error.exit_code == code
    if name != "EntrenarError":
        drawn = next(line for line in errors.__doc__.splitlines() if f"── {name} " in line)
        assert int(drawn.split(name)[1].split()[0]) == code

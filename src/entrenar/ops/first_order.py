"""Explain why no operation here has a second derivative, and raise the error in one place.

Each backward is derived and proved once; its own derivative is not. PyTorch would differentiate the lines of a backward
anyway and return a wrong second derivative wherever the backward uses what it saved as a constant (the reciprocal
deviation, the log-sum-exp). A backward whose own graph is recorded (`create_graph=True`) is therefore refused.
"""

import torch

from entrenar.errors import EntrenarError


def refuse_double_backward(op: str) -> None:
    """Raise when the caller's backward is being recorded for a second differentiation.

    Raises:
        EntrenarError: gradients are enabled inside the backward, that is `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise EntrenarError(
            f"{op} has a first derivative only, got backward(create_graph=True): "
            f"call reference_{op}, which torch differentiates any number of times"
        )

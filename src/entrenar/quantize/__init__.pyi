from entrenar.quantize.budget import EMBEDDING, HEAD, Budget, check_budget
from entrenar.quantize.calibration import calibration_rows
from entrenar.quantize.rounding import NO_ADAPTERS, Adapters, quantize_to_budget

__all__ = [
    "EMBEDDING",
    "HEAD",
    "NO_ADAPTERS",
    "Adapters",
    "Budget",
    "calibration_rows",
    "check_budget",
    "quantize_to_budget",
]

"""Operations with hand-derived gradients.

Each file holds one operation: its derivation, a plain reference, the arithmetic of forward and backward as functions
that cite the equations, the `autograd.Function`, and the public operation.
"""

from entrenar.ops.attention import Documents, attention
from entrenar.ops.linear import fastest_compute_dtype, linear
from entrenar.ops.linear_cross_entropy import linear_cross_entropy
from entrenar.ops.lora_linear import lora_linear
from entrenar.ops.rms_norm import rms_norm
from entrenar.ops.rope import rope
from entrenar.ops.swiglu import swiglu

__all__ = [
    "Documents",
    "attention",
    "fastest_compute_dtype",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
    "swiglu",
]

"""The kinds of quantized weights that a config or a file can name."""

from collections.abc import Callable, Mapping

from torch import Tensor

from entrenar.ops.quantized.bits import NfBitsWeight
from entrenar.ops.quantized.int8 import Int8Weight, quantize_int8
from entrenar.ops.quantized.nf4 import Nf4Weight, quantize_nf4
from entrenar.ops.quantized.protocol import QuantizedWeight

KINDS: Mapping[str, type[QuantizedWeight]] = {kind.kind: kind for kind in (Nf4Weight, Int8Weight, NfBitsWeight)}
# Those that need no width, and round a weight by itself.
QUANTIZE: Mapping[str, Callable[[Tensor], QuantizedWeight]] = {
    Nf4Weight.kind: quantize_nf4,
    Int8Weight.kind: quantize_int8,
}

from entrenar.ops.attention import attention
from entrenar.ops.documents import Documents, DocumentSpans, document_spans
from entrenar.ops.linear import fastest_compute_dtype, linear
from entrenar.ops.linear_cross_entropy import linear_cross_entropy
from entrenar.ops.lora_linear import lora_linear
from entrenar.ops.quantized.bits import NfBitsWeight, dequantize_nf_bits, nf_bits_size, quantize_nf_bits
from entrenar.ops.quantized.embedding import quantized_embedding
from entrenar.ops.quantized.int8 import Int8Weight, quantize_int8
from entrenar.ops.quantized.kinds import KINDS, QUANTIZE
from entrenar.ops.quantized.linear import quantized_linear
from entrenar.ops.quantized.nf4 import Nf4Weight, dequantize_nf4, quantize_nf4
from entrenar.ops.quantized.protocol import QuantizedWeight, stored_bytes
from entrenar.ops.rms_norm import rms_norm
from entrenar.ops.rope import rope
from entrenar.ops.swiglu import swiglu

__all__ = [
    "KINDS",
    "QUANTIZE",
    "DocumentSpans",
    "Documents",
    "Int8Weight",
    "Nf4Weight",
    "NfBitsWeight",
    "QuantizedWeight",
    "attention",
    "dequantize_nf4",
    "dequantize_nf_bits",
    "document_spans",
    "fastest_compute_dtype",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "nf_bits_size",
    "quantize_int8",
    "quantize_nf4",
    "quantize_nf_bits",
    "quantized_embedding",
    "quantized_linear",
    "rms_norm",
    "rope",
    "stored_bytes",
    "swiglu",
]

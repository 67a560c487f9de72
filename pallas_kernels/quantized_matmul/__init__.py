"""Products of activations with weights that are stored in four or eight bits."""

from pallas_kernels.quantized_matmul.api import for_decoding, quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, Rotation, dequantize, interleave

__all__ = [
    "QuantizedTensor",
    "Rotation",
    "dequantize",
    "for_decoding",
    "interleave",
    "quantized_matmul",
    "quantized_matmuls",
]

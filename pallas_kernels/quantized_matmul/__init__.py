"""Products of activations with weights that are stored in four or eight bits."""

from pallas_kernels.quantized_matmul.api import is_better_interleaved, quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, Rotation, dequantize, interleave
from pallas_kernels.quantized_matmul.turned import Rows, Turned, add_norm, gated_silu

__all__ = [
    "QuantizedTensor",
    "Rotation",
    "Rows",
    "Turned",
    "add_norm",
    "dequantize",
    "gated_silu",
    "interleave",
    "is_better_interleaved",
    "quantized_matmul",
    "quantized_matmuls",
]

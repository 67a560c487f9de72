"""Products of activations with weights that are stored in four or eight bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, Rotation, dequantize

__all__ = ["QuantizedTensor", "Rotation", "dequantize", "quantized_matmul", "quantized_matmuls"]

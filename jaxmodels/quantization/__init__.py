"""Quantized weights of whole models: reading and writing the layouts of other tools, and rounding to nearest."""

from jaxmodels.quantization.load import find_scheme
from jaxmodels.quantization.whole import round_head, round_params

__all__ = ["find_scheme", "round_head", "round_params"]

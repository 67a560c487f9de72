"""Quantized weights of whole models: reading and writing the layouts of other tools, and rounding to nearest."""

from jaxmodels.quantization.load import find_scheme

__all__ = ["find_scheme"]

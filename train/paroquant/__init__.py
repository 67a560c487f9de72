"""ParoQuant: scales, rotations and rounding of INT4 weights, optimised one decoder block at a time."""

from train.paroquant.optimize import ParoquantConfig, QuantizedLinear, optimize_block
from train.paroquant.pairs import Pairs, select_pairs

__all__ = ["Pairs", "ParoquantConfig", "QuantizedLinear", "optimize_block", "select_pairs"]

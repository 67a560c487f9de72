"""Layers that several models share."""

from jaxmodels.layers.embedding import embed
from jaxmodels.layers.linear import linear, linears
from jaxmodels.layers.rope import RopeConfig, rope_tables
from pallas_kernels.norm_rope import apply_rope, norm_rope, rms_norm
from pallas_kernels.quantized_matmul import add_norm, gated_silu

__all__ = [
    "RopeConfig",
    "add_norm",
    "apply_rope",
    "embed",
    "gated_silu",
    "linear",
    "linears",
    "norm_rope",
    "rms_norm",
    "rope_tables",
]

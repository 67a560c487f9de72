"""Layers that several models share."""

from jaxmodels.layers.embedding import embed
from jaxmodels.layers.gated import gated_silu
from jaxmodels.layers.linear import linear, linears
from jaxmodels.layers.rope import RopeConfig, rope_tables
from pallas_kernels.norm_rope import apply_rope, norm_rope, rms_norm

__all__ = [
    "RopeConfig",
    "apply_rope",
    "embed",
    "gated_silu",
    "linear",
    "linears",
    "norm_rope",
    "rms_norm",
    "rope_tables",
]

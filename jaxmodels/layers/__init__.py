"""Layers that several models share."""

from jaxmodels.layers.embedding import embed
from jaxmodels.layers.linear import linear, linears
from jaxmodels.layers.norm import rms_norm
from jaxmodels.layers.rope import RopeConfig, apply_rope, rope_tables

__all__ = ["RopeConfig", "apply_rope", "embed", "linear", "linears", "rms_norm", "rope_tables"]

"""Norm of each head and rotary embedding of queries and keys, in one launch."""

from pallas_kernels.norm_rope.api import norm_rope
from pallas_kernels.norm_rope.xla import apply_rope, rms_norm

__all__ = ["apply_rope", "norm_rope", "rms_norm"]

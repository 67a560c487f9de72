"""Attention of a few new queries to a stacked key-value cache."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]

"""Pairwise rotations of channels (ParoQuant)."""

from pallas_kernels.rotation.api import pairwise_rotation

__all__ = ["pairwise_rotation"]

"""Pairwise rotations of channels (ParoQuant)."""

from pallas_kernels.rotation.api import pairwise_rotation, pairwise_rotations
from pallas_kernels.rotation.turn import Turn

__all__ = ["Turn", "pairwise_rotation", "pairwise_rotations"]

"""Pairwise rotations of channels (ParoQuant), and what else happens to activations before they meet codes."""

from pallas_kernels.rotation.api import pairwise_rotation, pairwise_rotations
from pallas_kernels.rotation.source import Normed, Rows, made
from pallas_kernels.rotation.turn import Turn

__all__ = [
    "Normed",
    "Rows",
    "Turn",
    "made",
    "pairwise_rotation",
    "pairwise_rotations",
]

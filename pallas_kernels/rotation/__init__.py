"""Pairwise rotations of channels (ParoQuant), and what else happens to activations before they meet codes."""

from pallas_kernels.rotation.api import NORM_GROUP, makes_norms, pairwise_rotation, pairwise_rotations
from pallas_kernels.rotation.source import Normed, Rows, made
from pallas_kernels.rotation.turn import Turn

__all__ = [
    "NORM_GROUP",
    "Normed",
    "Rows",
    "Turn",
    "made",
    "makes_norms",
    "pairwise_rotation",
    "pairwise_rotations",
]

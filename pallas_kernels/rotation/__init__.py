"""Pairwise rotations of channels (ParoQuant), and what else happens to activations before they meet codes."""

from pallas_kernels.rotation.api import (
    NORM_GROUP,
    gated_rotations,
    makes_rows,
    normed_rotations,
    pairwise_rotation,
    pairwise_rotations,
)
from pallas_kernels.rotation.source import Gated, Normed
from pallas_kernels.rotation.turn import Turn

__all__ = [
    "NORM_GROUP",
    "Gated",
    "Normed",
    "Turn",
    "gated_rotations",
    "makes_rows",
    "normed_rotations",
    "pairwise_rotation",
    "pairwise_rotations",
]

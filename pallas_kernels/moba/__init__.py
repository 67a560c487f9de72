"""Block-routed attention (MoBA): each query sees its own block and the past blocks whose mean keys score highest."""

from pallas_kernels.moba.api import moba_attention, moba_select
from pallas_kernels.moba.centroids import CentroidCache, append_centroids, block_centroids, init_centroids
from pallas_kernels.moba.decode import moba_decode
from pallas_kernels.moba.key_conv import key_conv
from pallas_kernels.moba.lists import BlockLists, invert_selection

__all__ = [
    "BlockLists",
    "CentroidCache",
    "append_centroids",
    "block_centroids",
    "init_centroids",
    "invert_selection",
    "key_conv",
    "moba_attention",
    "moba_decode",
    "moba_select",
]

"""Flash attention over structured masks."""

from pallas_kernels.attention.api import flash_attention

__all__ = ["flash_attention"]

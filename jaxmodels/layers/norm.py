"""Normalisation layers."""

from pallas_kernels.rotation import rms_norm

__all__ = ["rms_norm"]

"""Normalisation layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x²) + epsilon) * weight` over the last axis; float32 inside, dtype of `x` out."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)

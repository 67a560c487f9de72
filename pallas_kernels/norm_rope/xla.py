"""The two steps as plain functions, which models also use one by one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x²) + epsilon) * weight` over the last axis; float32 inside, dtype of `x` out."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H / 2) of each head; float32 inside, result in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def run(
    heads: tuple[Array, ...], weights: tuple[Array | None, ...], cos: Array, sin: Array, epsilon: float
) -> tuple[Array, ...]:
    """Norm and rotation of each of the `heads` [B, T, N, H] with a weight."""
    return tuple(
        x if weight is None else apply_rope(rms_norm(x, weight, epsilon), cos, sin)
        for x, weight in zip(heads, weights, strict=True)
    )

"""The definition of `norm_rope`: head by head and pair by pair."""

import jax
import jax.numpy as jnp


def run(
    heads: tuple[jax.Array, ...], weights: tuple[jax.Array | None, ...], cos: jax.Array, sin: jax.Array, epsilon: float
) -> tuple[jax.Array, ...]:
    """Norm and rotation of each of the `heads` [B, T, N, H] with a weight."""
    results = []
    for x, weight in zip(heads, weights, strict=True):
        if weight is None:
            results.append(x)
            continue
        half = x.shape[-1] // 2
        result = jnp.zeros_like(x)
        for n in range(x.shape[2]):
            head = x[:, :, n].astype(jnp.float32)
            root = jnp.sqrt((head**2).sum(-1, keepdims=True) / (2 * half) + epsilon)
            normed = (head / root * weight.astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
            for i in range(half):
                a, b, c, s = normed[..., i], normed[..., half + i], cos[..., i], sin[..., i]
                result = result.at[:, :, n, i].set((a * c - b * s).astype(x.dtype))
                result = result.at[:, :, n, half + i].set((b * c + a * s).astype(x.dtype))
        results.append(result)
    return tuple(results)

"""The definition of `pairwise_rotation`: pair by pair."""

import jax.numpy as jnp
from jaxtyping import Array


def run(x: Array, theta: Array, pairs: Array, group_size: int, *, inverse: bool) -> Array:
    """Rotates x [..., I] by theta [R, I / 2] in the pairs [R, I]."""
    num_steps, channels = pairs.shape
    for step in reversed(range(num_steps)) if inverse else range(num_steps):
        for pair in range(channels // 2):
            first = pair * 2 // group_size * group_size
            i, j = first + pairs[step, 2 * pair], first + pairs[step, 2 * pair + 1]
            angle = -theta[step, pair] if inverse else theta[step, pair]
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            x_i, x_j = x[..., i], x[..., j]
            x = x.at[..., i].set(cos * x_i + sin * x_j).at[..., j].set(cos * x_j - sin * x_i)
    return x

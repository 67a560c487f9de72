"""Rotation of all channels at once: each is mixed with its partner, found by a gather."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def run(x: Array, theta: Array, pairs: Array, group_size: int, *, inverse: bool) -> Array:
    """Rotates x [..., I] by theta [R, I / 2] in the pairs [R, I]."""
    channels = x.shape[-1]
    first = jnp.arange(channels) // group_size * group_size

    def step(x, of_step):
        theta, pairs = of_step
        channel = first + pairs  # the channels in the order of their pairs
        place = jnp.zeros(channels, jnp.int32).at[channel].set(jnp.arange(channels, dtype=jnp.int32))
        partner = channel[place ^ 1]
        angle = theta[place // 2]
        sin = jnp.where(place % 2 == 0, 1, -1) * jnp.sin(-angle if inverse else angle)
        return x * jnp.cos(angle) + x[..., partner] * sin, None

    return jax.lax.scan(step, x, (theta, pairs.astype(jnp.int32)), reverse=inverse)[0]

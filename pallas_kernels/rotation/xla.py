"""Two forms of the rotation: channels mixed with their partners step by step, or one small matrix per group.

The matrices are what the steps make of the identity, which costs as much as rotating g rows. From there on a row costs
a product with them: on two CPU cores 2,048 rows of 2,048 channels take 16 ms instead of 95 (g = 128, 8 steps), and 128
rows as long either way. So more than g rows take the matrices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def run(x: Array, theta: Array, pairs: Array, group_size: int, *, inverse: bool) -> Array:
    """Rotates x [..., I] by theta [R, I / 2] in the pairs [R, I]."""
    if math.prod(x.shape[:-1]) <= group_size:
        return by_steps(x, theta, pairs, group_size, inverse=inverse)
    rotations = matrices(theta, pairs, group_size, inverse=inverse)
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    return jnp.einsum("...kg,gkh->...kh", groups, rotations, precision="highest").reshape(x.shape)


def matrices(
    theta: Float[Array, "R half"], pairs: Int[Array, "R I"], group_size: int, *, inverse: bool = False
) -> Float[Array, "g K g"]:
    """The orthogonal matrix of each of the K groups, `[from, group, to]`."""
    identity = jnp.tile(jnp.eye(group_size, dtype=theta.dtype), (1, pairs.shape[1] // group_size))
    rotated = by_steps(identity, theta, pairs, group_size, inverse=inverse)
    return rotated.reshape(group_size, -1, group_size)


def by_steps(x: Array, theta: Array, pairs: Array, group_size: int, *, inverse: bool) -> Array:
    """Step by step: each channel is mixed with its partner, found by a gather."""
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

"""The gate of SwiGLU."""

import functools

import jax
from jaxtyping import Array, Float


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_silu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`silu(gate) * up`; a backward pass keeps the two operands and none of the steps between."""
    return jax.nn.silu(gate) * up

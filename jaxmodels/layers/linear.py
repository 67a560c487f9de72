"""The one linear operation of all models."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "..."], weight: Float[Array, "..."], equation: str, *, dtype: jnp.dtype | None = None
) -> Float[Array, "..."]:
    """`einsum(equation, x, weight)`, for example `linear(x, w, "BTD,NHD->BTNH")`.

    Weights keep the layout of checkpoints, output axes first and the contracted axes last: loading copies
    nothing, and a product with few rows reads the weight contiguously, one output after the other.

    Args:
      x: activations.
      weight: weight of the layer.
      equation: two operands in the letters of the legend; `...` stands for leading axes.
      dtype: type of the result, also of the accumulation; None means that of `x`.
    """
    return jnp.einsum(equation, x, weight, preferred_element_type=dtype or x.dtype)

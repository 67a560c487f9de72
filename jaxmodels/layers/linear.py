"""The one linear operation of all models."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_ROWS = 64
"""On a CPU, products with at most this many rows run with the weight as the left operand (see `linear`)."""


def linear(
    x: Float[Array, "..."], weight: Float[Array, "..."], equation: str, *, dtype: jnp.dtype | None = None
) -> Float[Array, "..."]:
    """`einsum(equation, x, weight)`, for example `linear(x, w, "BTD,NHD->BTNH")`.

    Weights keep the layout of checkpoints, output axes first and the contracted axes last: loading copies nothing,
    and each output reads its part of the weight contiguously. It runs as one matrix product over the merged axes:
    with several contracted or several output axes XLA's CPU backend would transpose the weight at every call.

    With few rows on a CPU the weight becomes the left operand, which XLA's matrix product there reads 1.3 to 2.5
    times faster at 2 to 32 rows (README of jaxmodels/qwen). The barrier keeps XLA from swapping the operands back.

    Args:
      x: activations, leading axes and then the contracted ones.
      weight: weight of the layer, output axes and then the contracted ones.
      equation: the two operands in the letters of the legend; `...` stands for the leading axes.
      dtype: type of the result, also of the accumulation; None means that of `x`.
    """
    inputs, output = equation.split("->")
    x_axes, weight_axes = inputs.split(",")
    contracted = "".join(axis for axis in weight_axes if axis in x_axes)
    produced = weight_axes[: len(weight_axes) - len(contracted)]
    leading = x_axes.removesuffix(contracted)
    if not (contracted and weight_axes == produced + contracted and x_axes == leading + contracted):
        raise ValueError(f"x and weight must both end with the contracted axes {contracted!r}; got {equation!r}")
    if output != leading + produced:
        raise ValueError(f"the result must have the axes {leading + produced!r}; got {equation!r}")

    lead_shape, produced_shape = x.shape[: x.ndim - len(contracted)], weight.shape[: len(produced)]
    if x.shape[len(lead_shape) :] != weight.shape[len(produced) :]:
        raise ValueError(f"{equation}: x {x.shape} and weight {weight.shape} differ in the contracted axes")
    size = math.prod(weight.shape[len(produced) :])
    matrix = weight.reshape(-1, size)
    dtype = dtype or x.dtype
    if math.prod(lead_shape) <= FEW_ROWS and jax.default_backend() == "cpu":
        by_output = jnp.einsum("fd,rd->fr", matrix, x.reshape(-1, size), preferred_element_type=dtype)
        result = jax.lax.optimization_barrier(by_output).T
    else:
        result = jnp.einsum("...d,fd->...f", x.reshape(*lead_shape, size), matrix, preferred_element_type=dtype)
    return result.reshape(*lead_shape, *produced_shape)

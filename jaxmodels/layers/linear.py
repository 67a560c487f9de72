"""The one linear operation of all models, for one weight or several."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import MaybePartial
from pallas_kernels.quantized_matmul import QuantizedTensor, Rows, Turned, quantized_matmuls

FEW_ROWS = 64
"""On a CPU, products with at most this many rows run with the weight as the left operand (see `linear`)."""


def linear(
    x: Rows,
    weight: Float[Array, "..."] | QuantizedTensor,
    equation: str,
    *,
    dtype: jnp.dtype | None = None,
    merged: bool = True,
) -> MaybePartial:
    """`einsum(equation, x, weight)`, for example `linear(x, w, "BTD,NHD->BTNH")`.

    Weights keep the layout of checkpoints, output axes first and the contracted axes last: loading copies nothing,
    and each output reads its part of the weight contiguously. It runs as one matrix product over the merged axes:
    with several contracted or several output axes XLA's CPU backend would transpose the weight at every call.

    With few rows on a CPU the weight becomes the left operand, which XLA's matrix product there reads 1.3 to 2.5
    times faster at 2 to 32 rows (README of jaxmodels/qwen). The barrier keeps XLA from swapping the operands back.

    Args:
      x: activations, leading axes and then the contracted ones; those that are `Turned` for this weight with one
        contracted axis.
      weight: weight of the layer, output axes and then the contracted ones; in any format (`quantized_matmul`).
      equation: the two operands in the letters of the legend; `...` stands for the leading axes.
      dtype: type of the result, also of the accumulation; None means that of `x`.
      merged: False leaves a result that a kernel has in parts to its reader, as `Partial`.
    """
    (result,) = linears(x, (weight,), (equation,), dtype=dtype, merged=merged)
    return result


def linears(
    x: Rows,
    weights: Sequence[Float[Array, "..."] | QuantizedTensor],
    equations: Sequence[str],
    *,
    dtype: jnp.dtype | None = None,
    merged: bool = True,
) -> tuple[MaybePartial, ...]:
    """`linear` of the same activations with several weights, such as those of queries, keys and values.

    Quantized weights are multiplied together where a kernel can, and what they do to their activations first is done
    for all of them together.
    """
    shapes = [_shapes(x, weight, equation) for weight, equation in zip(weights, equations, strict=True)]
    dtype = dtype or x.dtype
    products: dict[int, MaybePartial] = {}
    quantized = {i: weight for i, weight in enumerate(weights) if isinstance(weight, QuantizedTensor)}
    if quantized:
        rows = x.reshape(shapes[min(quantized)].rows)
        results = quantized_matmuls(rows, [*quantized.values()], dtype=dtype, merged=merged)
        products |= zip(quantized, results, strict=True)
    if isinstance(x, Turned) and len(quantized) < len(weights):
        raise ValueError("x was turned for quantized weights; got others among them")
    for i, weight in enumerate(weights):
        if not isinstance(weight, QuantizedTensor):
            products[i] = _product(x.reshape(shapes[i].rows), weight, dtype)
    return tuple(products[i].reshape(shape.result) for i, shape in enumerate(shapes))


class _Shapes(NamedTuple):
    rows: tuple[int, ...]  # of the activations with the contracted axes merged
    result: tuple[int, ...]


def _shapes(x: Rows, weight: Array | QuantizedTensor, equation: str) -> _Shapes:
    """Checks that the operands fit the equation."""
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
    if isinstance(weight, QuantizedTensor) and weight.num_inputs != len(contracted):
        raise ValueError(f"{equation}: {len(contracted)} contracted axes; the weight has {weight.num_inputs}")
    return _Shapes((*lead_shape, math.prod(weight.shape[len(produced) :])), (*lead_shape, *produced_shape))


# A backward pass keeps the shapes as they came. Of a weight that a scan consumes that is no second copy; of its
# reshaped form it would be.
@functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable, static_argnums=(2,))
def _product(x: Array, weight: Array, dtype: jnp.dtype) -> Array:
    """`x [..., d]` times the weight as a matrix of d columns, `[..., f]`."""
    matrix = weight.reshape(-1, x.shape[-1])
    if math.prod(x.shape[:-1]) <= FEW_ROWS and jax.default_backend() == "cpu":
        by_output = jnp.einsum("fd,rd->fr", matrix, x.reshape(-1, x.shape[-1]), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(by_output).T
    return jnp.einsum("...d,fd->...f", x, matrix, preferred_element_type=dtype)

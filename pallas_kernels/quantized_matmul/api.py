"""`quantized_matmul`: argument checks and the choice of implementation."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import reference, xla
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

NAMES = ("mosaic", "xla", "reference")


def quantized_matmul(
    x: Float[Array, "*rows I"],
    weight: QuantizedTensor,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """`x @ dequantize(weight).T`, without the dense weight in memory for long.

    Activations are scaled, rotated and ordered as the weight asks (in float32, then rounded to bfloat16 if `x` is
    that), rounded to eight bits if it asks for that too, and multiplied with the codes; sums are float32 (int32 of int8
    codes) and rounded once. Differentiable in `x` and in the floating parts of the weight, but for rounded activations.

    Args:
      x: activations; float32, bfloat16 or float16.
      weight: see there.
      dtype: type of the result; None is that of `x`.
      implementation: "xla" or "reference"; None is "xla". "mosaic" is not written yet.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic".
    """
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    if implementation == "mosaic":
        raise NotImplementedError('quantized_matmul "mosaic": there is no Hopper kernel yet; use "xla"')
    if not isinstance(weight, QuantizedTensor):
        raise ValueError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
    weight.check()
    if x.ndim < 1 or x.shape[-1] != weight.inputs or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating and end with {weight.inputs} inputs; got {x.dtype} of shape {x.shape}")
    weight = weight.sliced()
    turned = weight.turn(x.reshape(math.prod(x.shape[:-1]), weight.inputs))
    if x.dtype == jnp.bfloat16:
        turned = turned.astype(x.dtype)
    run = reference.run if implementation == "reference" else xla.run
    return run(turned, weight).astype(dtype or x.dtype).reshape(*x.shape[:-1], weight.outputs)

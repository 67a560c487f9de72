"""`quantized_matmul`: argument checks and the choice of implementation."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.quantized_matmul import mosaic_sm90, reference, xla
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
      implementation: "mosaic", "xla" or "reference"; None is "xla". The Hopper kernel takes int4 codes, bfloat16
        activations and one device, has no gradients, and reads the weight of a stack in place.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic" cannot run this call, and why.
    """
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    if not isinstance(weight, QuantizedTensor):
        raise ValueError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
    weight.check()
    if x.ndim < 1 or x.shape[-1] != weight.inputs or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating and end with {weight.inputs} inputs; got {x.dtype} of shape {x.shape}")
    turned = weight.turn(x.reshape(math.prod(x.shape[:-1]), weight.inputs))
    if x.dtype == jnp.bfloat16:
        turned = turned.astype(x.dtype)
    if implementation == "mosaic":
        if (reason := hopper_unsupported(turned, weight)) is not None:
            raise NotImplementedError(f'quantized_matmul "mosaic": {reason}')
        result = mosaic_sm90.run(turned, *_stack(weight), group_size=_groups(weight))
    else:
        run = reference.run if implementation == "reference" else xla.run
        result = run(turned, weight.sliced())
    return result.astype(dtype or x.dtype).reshape(*x.shape[:-1], weight.outputs)


def hopper_unsupported(x: Any, weight: QuantizedTensor) -> str | None:
    """Why the Hopper kernel cannot multiply these activations `[M, I]`, already turned; None when it can."""
    if weight.format != "int4":
        return f"multiplies with int4 codes; got {weight.format}"
    if (reason := dispatch.undivided()) is not None:
        return reason
    return mosaic_sm90.unsupported(x, *_stack(weight), group_size=_groups(weight))


def _stack(weight: QuantizedTensor) -> tuple[Any, Any, Any, Any]:
    """Codes, scales and zeros with an axis of layers, and the index of the layer."""
    parts = (weight.codes, weight.scales, weight.zeros)
    if weight.layer is not None:
        return *parts, weight.layer
    return *(None if part is None else part[None] for part in parts), jnp.int32(0)


def _groups(weight: QuantizedTensor) -> int:
    return -1 if weight.scales.shape[-2] == 1 else weight.group_size

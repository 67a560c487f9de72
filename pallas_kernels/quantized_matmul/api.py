"""`quantized_matmul` and `quantized_matmuls`: argument checks and the choice of implementation."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partitioning
from pallas_kernels.quantized_matmul import mosaic_sm90, reference, rounding, xla
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, turn_all

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
      implementation: "mosaic", "xla" or "reference"; None is the automatic choice (`automatic`). "mosaic", the Hopper
        kernel, takes all codes, bfloat16 activations (any, where they are rounded) and one device, and reads the weight
        of a stack in place; its gradients are those of "xla".

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic" cannot run this call, and why.
    """
    (result,) = quantized_matmuls(x, (weight,), dtype=dtype, implementation=implementation)
    return result


def quantized_matmuls(
    x: Float[Array, "*rows I"],
    weights: Sequence[QuantizedTensor],
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """`quantized_matmul` of the same activations with each of the weights, which are rotated for all in one launch."""
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    for weight in weights:
        if not isinstance(weight, QuantizedTensor):
            raise ValueError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
        weight.check()
        if x.ndim < 1 or x.shape[-1] != weight.inputs or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x must be floating and end with {weight.inputs} inputs; got {x.dtype} of shape {x.shape}"
            )
    dtype = jnp.dtype(dtype or x.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    products = (
        _product(turned, weight, dtype, implementation)
        for turned, weight in zip(turn_all(rows, weights), weights, strict=True)
    )
    return tuple(product.reshape(*x.shape[:-1], product.shape[1]) for product in products)


def _product(turned: Array, weight: QuantizedTensor, dtype: Any, implementation: str | None) -> Array:
    if implementation is None:
        implementation, _ = automatic(turned, weight, dtype=dtype)
    elif implementation == "mosaic" and (reason := hopper_unsupported(turned, weight)) is not None:
        raise NotImplementedError(f'quantized_matmul "mosaic": {reason}')
    if implementation == "mosaic":
        result = _on_hopper(turned, weight, _kernel_result(weight, dtype))
    else:
        run = reference.run if implementation == "reference" else xla.run
        result = run(turned, weight.sliced())
    return result.astype(dtype)


def automatic(x: Any, weight: QuantizedTensor, *, dtype: Any) -> tuple[str, str]:
    """The implementation that a call without a name takes, and why no other, in words.

    Args:
      x: activations `[M, I]`, already turned.
      weight: of the call.
      dtype: of the result.
    """
    if x.shape[0] == 0:
        return "xla", "nothing to do"
    if (reason := dispatch.undivided()) is not None:
        return "xla", f"mosaic: {reason}"
    kind = dispatch.ProductKind(
        codes=weight.format,
        group_size=_groups(weight),
        zeros=weight.zeros is not None,
        scales=str(weight.scales.dtype),
        result=str(_kernel_result(weight, dtype)),
        activations=weight.activations or "",
    )
    sizes = {"rows": x.shape[0], "outputs": weight.outputs, "inputs": weight.inputs}
    (first, *_), reason = dispatch.preferred("quantized_matmul", kind, sizes, gradients=False)
    if first == "mosaic" and (why_not := hopper_unsupported(x, weight)) is not None:
        return "xla", f"mosaic: {why_not}"
    return first, reason


def hopper_unsupported(x: Any, weight: QuantizedTensor) -> str | None:
    """Why the Hopper kernel cannot multiply these activations `[M, I]`, already turned; None when it can."""
    if (reason := dispatch.undivided()) is not None:
        return reason
    if weight.activations is not None:  # their codes are what the kernel gets
        x = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return mosaic_sm90.unsupported(x, **_stack(weight), **_options(weight))


def _kernel_result(weight: QuantizedTensor, dtype: Any) -> Any:
    """What the kernel is asked for, which rounds to bfloat16 itself if no scales of tokens are to follow."""
    is_last = dtype == jnp.bfloat16 and weight.activations is None
    return jnp.dtype(jnp.bfloat16 if is_last else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _on_hopper(x: Array, weight: QuantizedTensor, dtype: Any) -> Array:
    """The kernel's product `[M, O]`; its derivatives are XLA's.

    Codes of rounded activations are bfloat16 numbers, so their products are those of eight bits, summed in float32.
    """

    def product(x, arrays):
        return mosaic_sm90.run(x, **arrays, **_options(weight), dtype=dtype)

    if weight.activations is None:
        return partitioning.over_rows(product, x, _stack(weight))
    codes, scale = rounding.activations(x, weight.activations, weight.own(weight.activation_scale))
    return partitioning.over_rows(product, codes.astype(jnp.bfloat16), _stack(weight)) * scale


def _on_hopper_fwd(x: Array, weight: QuantizedTensor, dtype: Any) -> tuple[Array, Any]:
    return _on_hopper(x, weight, dtype), (x, weight)


def _on_hopper_bwd(dtype: Any, residuals: Any, cotangent: Array) -> Any:
    del dtype
    return jax.vjp(lambda x, weight: xla.run(x, weight.sliced()), *residuals)[1](cotangent.astype(jnp.float32))


_on_hopper.defvjp(_on_hopper_fwd, _on_hopper_bwd)


def _stack(weight: QuantizedTensor) -> dict[str, Any]:
    """The kernel's arrays by name, with an axis of layers, and the index of the layer."""
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "global_scale")}
    if weight.layer is not None:
        return parts | {"layer": weight.layer}
    return {name: None if part is None else part[None] for name, part in parts.items()} | {"layer": jnp.int32(0)}


def _options(weight: QuantizedTensor) -> dict[str, Any]:
    return {"group_size": _groups(weight), "format": weight.format}


def _groups(weight: QuantizedTensor) -> int:
    return -1 if weight.scales.shape[-2] == 1 else weight.group_size

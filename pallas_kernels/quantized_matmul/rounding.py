"""Rounding to the nearest code, of weights and of activations."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import nibbles
from pallas_kernels.quantized_matmul.grid import codes_of, grid_of
from pallas_kernels.quantized_matmul.tensor import CODES, Activations, Format, QuantizedTensor

FP8_MAX, E2M1_MAX = 448.0, 6.0
SMALLEST = 1e-8  # of a scale


def round_weight(
    weight: Float[Array, "..."],
    format: Format,
    *,
    num_inputs: int = 1,
    group_size: int | None = None,
    symmetric: bool = False,
    per_tensor: bool = False,
    activations: Activations | None = None,
) -> QuantizedTensor:
    """The weight rounded to the nearest codes of a format.

    int4: a grid from the smallest to the largest weight of a group (and 0), scales in float16, which the codes take
    into account; symmetric: from minus to plus the largest magnitude in 15 steps. int8, fp8: the largest magnitude of
    an output's weights (or of all) becomes 127 or 448. nvfp4: blocks of 16 and one scale of all, as ModelOpt has it.

    Args:
      weight: `[*outputs, *inputs]`.
      format: of the codes.
      num_inputs: trailing axes that are contracted.
      group_size: inputs that share a scale, "int4" only; None is 128, -1 all of them.
      symmetric: no zeros, "int4" only.
      per_tensor: one scale for all, "int8" and "fp8" only.
      activations: what the product is to round activations to; must be `format`.

    Raises:
      ValueError: an option that the format has not, a group size that does not divide the inputs.
    """
    if format not in CODES:
        raise ValueError(f"format must be one of {[*CODES]}; got {format!r}")
    if (group_size is not None or symmetric) and format != "int4":
        raise ValueError(f"group_size and symmetric are options of int4; got format {format!r}")
    if per_tensor and format not in ("int8", "fp8"):
        raise ValueError(f"per_tensor is an option of int8 and fp8; got format {format!r}")
    if not 0 < num_inputs < weight.ndim:
        raise ValueError(f"num_inputs must lie between 0 and the {weight.ndim} axes of the weight; got {num_inputs}")
    shape = weight.shape
    outputs = 1
    for size in shape[: len(shape) - num_inputs]:
        outputs *= size
    rows = weight.reshape(outputs, -1).astype(jnp.float32)
    if format == "int4":
        parts = _int4(rows, group_size or 128, symmetric)
    elif format == "nvfp4":
        parts = _nvfp4(rows)
    else:
        parts = _bytes(rows, format, per_tensor)
    result = QuantizedTensor(**parts, format=format, shape=shape, num_inputs=num_inputs, activations=activations)
    result.check()
    return result


def _int4(rows: Array, group_size: int, symmetric: bool) -> dict[str, Any]:
    outputs, inputs = rows.shape
    group_size = inputs if group_size == -1 else group_size
    if group_size < 1 or inputs % group_size:
        raise ValueError(f"group_size must be -1 or divide the {inputs} inputs; got {group_size}")
    if symmetric:
        groups = rows.reshape(outputs, -1, group_size)
        scales = storable(jnp.maximum(jnp.abs(groups).max(axis=2), SMALLEST) / 7)
        codes = jnp.clip(jnp.round(groups / scales[..., None].astype(jnp.float32)), -8, 7).astype(jnp.int8)
        return {"codes": nibbles.pack(codes.reshape(outputs, inputs)), "scales": scales.T}
    grid = grid_of(rows, group_size)
    scales = storable(grid.scale)
    codes, zeros = codes_of(rows, grid._replace(scale=scales.astype(jnp.float32)))
    return from_unsigned(codes, zeros.T, scales.T)


def from_unsigned(codes: Array, zeros: Array, scales: Array) -> dict[str, Any]:
    """Fields of a tensor for codes 0..15 `[O, I]`, their zeros `[G, O]` and scales `[G, O]`."""
    return {"codes": nibbles.pack(codes - 8), "zeros": (zeros - 8).astype(jnp.int8), "scales": scales}


def storable(scales: Array) -> Array:
    """Scales as checkpoints hold them: float16, and none of them 0 or infinite."""
    limits = jnp.finfo(jnp.float16)
    return jnp.clip(scales, limits.smallest_subnormal, limits.max).astype(jnp.float16)


def _bytes(rows: Array, format: Format, per_tensor: bool) -> dict[str, Any]:
    largest = jnp.abs(rows).max() if per_tensor else jnp.abs(rows).max(axis=1, keepdims=True)
    codes, scale = to_bytes(rows, format, largest)
    return {"codes": codes, "scales": jnp.broadcast_to(scale, (len(rows), 1)).T}


def _nvfp4(rows: Array) -> dict[str, Any]:
    outputs, inputs = rows.shape
    if inputs % 16:
        raise ValueError(f"NVFP4 needs a multiple of 16 inputs; got {inputs}")
    blocks = rows.reshape(outputs, inputs // 16, 16)
    global_scale = jnp.maximum(jnp.abs(rows).max(), SMALLEST) / (E2M1_MAX * FP8_MAX)
    largest = jnp.abs(blocks).max(axis=2)
    scales = to_fp8(jnp.where(largest == 0, 1.0, largest / (E2M1_MAX * global_scale)))
    # A block far below the others rounds to scale 0, and then to codes 0.
    step = scales.astype(jnp.float32)[..., None] * global_scale
    values = jnp.where(step == 0, 0, jnp.clip(blocks / step, -E2M1_MAX, E2M1_MAX))
    return {
        "codes": nibbles.pack(to_e2m1(values).reshape(outputs, inputs)),
        "scales": scales.T,
        "global_scale": global_scale,
    }


def to_fp8(x: Array) -> Array:
    """Saturating cast to float8_e4m3fn: what lies beyond becomes ±448, where the plain cast gives NaN."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def to_e2m1(x: Array) -> Array:
    """The codes 0..15 of the nearest E2M1 floats, ties to the even code; uint8."""
    borders = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], jnp.float32)
    magnitude = jnp.abs(x)[..., None]
    odd = jnp.arange(7) % 2 == 1  # of the code below a border: a tie there goes up to the even one
    code = jnp.where(odd, magnitude >= borders, magnitude > borders).sum(axis=-1)
    return (code + 8 * jnp.signbit(x)).astype(jnp.uint8)


def to_bytes(x: Array, format: Format, largest: Array) -> tuple[Array, Array]:
    """Codes and float32 scale of values whose magnitude is at most `largest` (broadcast against them)."""
    scale = jnp.maximum(largest, SMALLEST) / (127.0 if format == "int8" else FP8_MAX)
    return to_codes(x, format, scale), scale


def to_codes(x: Array, format: Format, scale: Array) -> Array:
    """Codes of x / scale in int8 (-127..127) or float8_e4m3fn, the nearest ones; what lies beyond saturates."""
    if format == "fp8":
        return to_fp8(x / scale)
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8)


def activations(x: Float[Array, "M I"], kind: Activations, scale: Array | None = None) -> tuple[Array, Array]:
    """Codes of activations and their scales: the fixed one, or one per token `[M, 1]` from its largest magnitude."""
    x = x.astype(jnp.float32)
    if scale is not None:
        return to_codes(x, kind, scale), scale
    return to_bytes(x, kind, jnp.abs(x).max(axis=1, keepdims=True))

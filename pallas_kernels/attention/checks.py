"""Argument checks that both attention operations share. Each raises ValueError naming argument and value."""

from typing import Any

import jax.numpy as jnp
from jax import Array

DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_heads(*arrays: tuple[str, Any]) -> None:
    """Queries `[B, T, N, H]` first, then keys `[B, S, K, H]` and values `[B, S, K, Hv]`, each with its name."""
    (q_name, q), (k_name, k), *values = arrays
    for name, array in arrays:
        if len(array.shape) != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head_dim]; got shape {array.shape}")
        if str(array.dtype) not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {array.dtype}")
        if 0 in array.shape[1:]:
            raise ValueError(f"{name} must have no empty axis but the batch; got shape {array.shape}")
        if array.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of {q_name}, {q.dtype}; got {array.dtype}")
    for name, array in values:
        if array.shape[:3] != k.shape[:3]:
            raise ValueError(f"{name} must share batch, length and heads with {k_name} {k.shape}; got {array.shape}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"{k_name} must share batch and head_dim with {q_name} {q.shape}; got {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the {q.shape[2]} heads of {q_name} must be a multiple of the {k.shape[2]} of {k_name}")


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale as a float; None is head_dim ** -0.5."""
    if scale is None:
        return float(head_dim**-0.5)
    if not (isinstance(scale, int | float) and 0.0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive finite Python number or None; got {scale!r}")
    return float(scale)


def check_choice(implementation: str | None, implementations: dict[str, Any]) -> None:
    if implementation not in (None, *implementations):
        raise ValueError(f"implementation must be None or one of {[*implementations]}; got {implementation!r}")


def int_array(name: str, array: Any, shape: tuple[int, ...]) -> Array:
    """`array` as int32 after its kind and shape were checked."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {array.shape}")
    return array.astype(jnp.int32)


def int_array_or_none(name: str, array: Any, shape: tuple[int, ...]) -> Array | None:
    """`int_array`, but None stays None."""
    return None if array is None else int_array(name, array, shape)

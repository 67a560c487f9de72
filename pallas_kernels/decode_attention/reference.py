"""The definition of `decode_attention`: one layer of the cache and the own keys side by side, dense, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from pallas_kernels.attention.reference import attend
from pallas_kernels.decode_attention.operands import Operands
from pallas_kernels.masks import Mask


def unsupported(
    q: Array, k_cache: Array, v_cache: Array, *, operands: Operands, own_mask: Mask, scale: float
) -> str | None:
    return None


def visible(operands: Operands, own_mask: Mask, capacity: int) -> Bool[Array, "B T S_and_own"]:
    """Which cache slots (the first S columns) and own keys (T more, if any) each query sees."""
    batch, num_queries = operands.q_positions.shape
    slots = jnp.arange(capacity)[None]
    filled = slots < operands.kv_lengths[:, None]
    if operands.k_positions is None:
        positions = jnp.broadcast_to(slots, (batch, capacity))
    else:
        positions = operands.k_positions
        filled &= positions >= 0
    seen = jnp.broadcast_to(filled[:, None], (batch, num_queries, capacity))
    if operands.own_k is not None:
        index = jnp.arange(num_queries)
        own = jnp.broadcast_to(own_mask.allowed(index[:, None], index[None]), (batch, num_queries, num_queries))
        if operands.own_lengths is not None:
            own &= index < operands.own_lengths[:, None, None]
        seen = jnp.concatenate([seen, own], axis=2)
        positions = jnp.concatenate([positions, operands.q_positions], axis=1)
    if operands.window is not None:
        near = operands.q_positions[:, :, None] - positions[:, None] < operands.window
        seen &= near | (positions < operands.num_sinks)[:, None]
    return seen


def _values(cache: Array, scales: Array | None, layer: Array, dtype: jnp.dtype) -> Float[Array, "B S K H"]:
    """Keys or values of one layer; codes are multiplied out in float32 (float64 for float64 queries)."""
    here = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    if scales is None:
        return here
    precise = jnp.promote_types(dtype, jnp.float32)
    scales = jax.lax.dynamic_index_in_dim(scales, layer, keepdims=False).astype(precise)  # [K] or [B, K, S]
    scales = scales[None, None] if scales.ndim == 1 else jnp.swapaxes(scales, 1, 2)
    return here.astype(precise) * scales[..., None]


def run(
    q: Float[Array, "B T N H"],
    k_cache: Num[Array, "L B S K H"],
    v_cache: Num[Array, "L B S K H"],
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `decode_attention`."""
    k = _values(k_cache, operands.k_scale, operands.layer, q.dtype)
    v = _values(v_cache, operands.v_scale, operands.layer, q.dtype)
    seen = visible(operands, own_mask, k.shape[1])
    if operands.own_k is not None and operands.own_v is not None:
        k = jnp.concatenate([k, operands.own_k.astype(k.dtype)], axis=1)
        v = jnp.concatenate([v, operands.own_v.astype(v.dtype)], axis=1)
    return attend(q, k, v, seen, scale)

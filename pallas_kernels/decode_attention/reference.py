"""The definition of `decode_attention`: one layer of the cache and the own keys side by side, dense, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.reference import attend, visible_scores
from pallas_kernels.attention.skip import Skip, SkipTile
from pallas_kernels.decode_attention.operands import Operands
from pallas_kernels.masks import Mask


def unsupported(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
    skip: Skip | None = None,
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
    skip: Skip | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles of the cache were kept; see `decode_attention`."""
    k = _values(k_cache, operands.k_scale, operands.layer, q.dtype)
    v = _values(v_cache, operands.v_scale, operands.layer, q.dtype)
    capacity = k.shape[1]
    seen = visible(operands, own_mask, capacity)
    keep = None if skip is None else keep_tiles(q, k, seen[:, :, :capacity], scale, skip)
    if operands.own_k is not None and operands.own_v is not None:
        k = jnp.concatenate([k, operands.own_k.astype(k.dtype)], axis=1)
        v = jnp.concatenate([v, operands.own_v.astype(v.dtype)], axis=1)
    if keep is None or skip is None:
        return attend(q, k, v, seen, scale)
    batch, num_queries, num_heads, _ = q.shape
    kept = jnp.repeat(keep, skip.tile.width, axis=2)[:, :, :capacity]  # [B, K, S]
    kept = jnp.repeat(kept, num_heads // k.shape[2], axis=1)
    own = jnp.ones((batch, num_heads, k.shape[1] - capacity), bool)  # own keys are never skipped
    kept = jnp.concatenate([kept, own], axis=2)[:, :, None]
    return *attend(q, k, v, seen, scale, jnp.broadcast_to(kept, (batch, num_heads, num_queries, kept.shape[3]))), keep


def keep_tiles(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], seen: Bool[Array, "B T S"], scale: float, skip: Skip
) -> Bool[Array, "B K tiles"]:
    """Which tiles of the cache each key head keeps, by the rule of `attention/skip.py`."""
    scores = visible_scores(q, k, seen, scale)
    batch, num_kv_heads, group, num_queries, capacity = scores.shape
    scores = scores.reshape(batch, num_kv_heads, group * num_queries, capacity)
    missing = -capacity % skip.tile.width
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, missing)], constant_values=-jnp.inf)
    top = scores.reshape(*scores.shape[:3], -1, skip.tile.width).max(axis=-1)
    return rule.keeps(rule.margins(top, skip.tile.chains), skip.log_threshold[:, None, None])


def visited_tiles(operands: Operands, capacity: int, tile: SkipTile) -> Int[Array, "B"]:
    """Tiles of the cache with a visible slot, per row of the batch, for a call without a window."""
    filled = jnp.arange(capacity) < operands.kv_lengths[:, None]
    if operands.k_positions is not None:
        filled &= operands.k_positions >= 0
    filled = jnp.pad(filled, ((0, 0), (0, -capacity % tile.width)))
    return filled.reshape(filled.shape[0], -1, tile.width).any(axis=2).sum(axis=1)

"""The definition of `flash_attention`: dense, float32, highest precision. Grows with T x S; for tests only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip
from pallas_kernels.masks import Mask


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> str | None:
    return None


def visible(mask: Mask, limits: Limits, num_queries: int, num_keys: int) -> Bool[Array, "#B T S"]:
    """Which keys each query sees, all rules together."""
    q_index = (jnp.arange(num_queries) + mask.query_offset(num_queries, num_keys))[None]
    k_index = jnp.arange(num_keys)[None]
    q_position = q_index if limits.q_positions is None else limits.q_positions
    k_position = k_index if limits.k_positions is None else limits.k_positions
    allowed = mask.allowed(q_position[:, :, None], k_position[:, None, :])
    if limits.k_positions is not None:
        allowed &= (limits.k_positions >= 0)[:, None, :]
    if limits.kv_lengths is not None:
        allowed &= (k_index < limits.kv_lengths[:, None])[:, None, :]
    if limits.q_segments is not None and limits.k_segments is not None:
        allowed &= limits.q_segments[:, :, None] == limits.k_segments[:, None, :]
        allowed &= (limits.k_segments >= 0)[:, None, :]
    return allowed


def visible_scores(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], seen: Bool[Array, "#B T S"], scale: float
) -> Float[Array, "B K G T S"]:
    """scale * q k^T where seen, else -inf; at least float32."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    seen = jnp.broadcast_to(seen, (batch, num_queries, num_keys))
    # Rows and slots that take part in no pair are zeroed by selection: 0 * NaN would be NaN, also in gradients.
    q = jnp.where(seen.any(2)[:, :, None, None], q, 0).astype(precise)
    k = jnp.where(seen.any(1)[:, :, None, None], k, 0).astype(precise)
    q = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision="highest")
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    seen: Bool[Array, "#B T S"],
    scale: float,
    kept: Bool[Array, "B N T S"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """softmax(scale * q k^T where seen) v, and the natural log-sum-exp of the seen scores.

    `kept` leaves more pairs out, head by head; each row that sees a key must keep one.
    """
    dtype = q.dtype
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    scores = visible_scores(q, k, seen, scale)
    if kept is not None:
        scores = jnp.where(kept.reshape(scores.shape), scores, -jnp.inf)
    seen = jnp.broadcast_to(seen, (batch, num_queries, num_keys))
    v = jnp.where(seen.any(1)[:, :, None, None], v, 0).astype(scores.dtype)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)  # an empty row: exp(-inf - 0) = 0 rather than exp(-inf + inf)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0.0
    probabilities = weights / jnp.where(empty, 1.0, total)
    out = jnp.einsum("BKGTS,BSKV->BTKGV", probabilities, v, precision="highest")
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + top)
    out = out.reshape(batch, num_queries, num_heads, v.shape[3])
    out = jnp.where(seen.any(2)[:, :, None, None], out, 0)  # also drops such rows' cotangents
    return out.astype(dtype), lse.reshape(batch, num_heads, num_queries)


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    limits: Limits,
    scale: float,
    skip: Skip | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles were kept; see `flash_attention`."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    seen = visible(mask, limits, num_queries, num_keys)
    if skip is None:
        return attend(q, k, v, seen, scale)
    keep = keep_tiles(q, k, seen, scale, skip)
    return *attend(q, k, v, seen, scale, rule.per_pair(keep, skip.tile, num_queries, num_keys)), keep


def keep_tiles(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], seen: Bool[Array, "#B T S"], scale: float, skip: Skip
) -> Bool[Array, "B N query_tiles key_tiles"]:
    """Which tiles are kept, by the rule of `skip.py`."""
    scores = jax.lax.stop_gradient(visible_scores(q, k, seen, scale))
    batch, num_kv_heads, group, num_queries, num_keys = scores.shape
    top = rule.tile_tops(scores.reshape(batch, num_kv_heads * group, num_queries, num_keys), skip.tile)
    return rule.keeps(rule.margins(top), skip.log_threshold[:, None, None, None])

"""The definition of `moba_attention`: a dense mask per query head, float32, highest precision. For tests only.

A block is represented by its first key, so that sequences packed in one row need no list of blocks: the gate is a
[T, S] matrix that is -inf at every key but the first of a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.reference import attend


def places(
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"]
) -> tuple[Bool[Array, "B T S"], Int[Array, "B T"], Int[Array, "B S"]]:
    """Which pairs are of one sequence, and the position of each query and key within its sequence.

    The last query of a sequence stands at its last key; a query before its first key has a negative position.
    """
    same = (q_segments[:, :, None] == k_segments[:, None]) & (k_segments >= 0)[:, None]
    earlier_keys = (k_segments[:, :, None] == k_segments[:, None]) & jnp.tri(k_segments.shape[1], k=-1, dtype=bool)
    same_queries = q_segments[:, :, None] == q_segments[:, None]
    later_queries = same_queries & ~jnp.tri(q_segments.shape[1], dtype=bool)
    return same, same.sum(axis=2) - 1 - later_queries.sum(axis=2), earlier_keys.sum(axis=2)


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    *,
    block_size: int,
    top_k: int,
    causal: bool,
) -> tuple[Int[Array, "B T N top_k"], Bool[Array, "B N T S"]]:
    """Selected blocks, best first, -1 in spare places; and the keys in them."""
    q, k = jax.lax.stop_gradient((q, k))
    precise = jnp.promote_types(q.dtype, jnp.float32)
    num_keys = k.shape[1]
    same, q_place, k_place = places(q_segments, k_segments)
    index = jnp.arange(num_keys)
    head = index - k_place % block_size  # first key of each key's block
    is_head = (head == index) & (k_segments >= 0)
    block_sum = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, num_keys))
    real = (k_segments >= 0)[:, :, None, None]
    size = block_sum(real.astype(precise), head)
    centroid = (block_sum(jnp.where(real, k, 0).astype(precise), head) / jnp.maximum(size, 1)).astype(k.dtype)
    group = q.shape[2] // k.shape[2]
    centroid = jnp.repeat(centroid, group, axis=2).astype(precise)
    gate = jnp.einsum("BTNH,BSNH->BNTS", q.astype(precise), centroid, precision="highest")
    gate = jnp.where(jnp.isnan(gate), -jnp.inf, gate)
    candidate = same & is_head[:, None]
    if causal:
        own = (q_place // block_size)[:, :, None] == (k_place // block_size)[:, None]
        past = (k_place // block_size)[:, None] < (q_place // block_size)[:, :, None]
        gate = jnp.where((candidate & own)[:, None], jnp.inf, jnp.where((candidate & past)[:, None], gate, -jnp.inf))
    else:
        gate = jnp.where(candidate[:, None], gate, -jnp.inf)
    # A stable ascending sort read from its end: of equal scores the higher block comes first.
    columns = jnp.pad(jnp.argsort(gate, axis=-1, stable=True)[..., ::-1], [(0, 0)] * 3 + [(0, top_k)])[..., :top_k]
    chosen = jnp.take_along_axis(gate, columns, axis=-1) > -jnp.inf
    chosen &= jnp.arange(top_k) < num_keys
    blocks = jax.vmap(lambda place, at: place[at])(k_place // block_size, columns)
    indices = jnp.where(chosen, blocks, -1).astype(jnp.int32)
    kept = jnp.zeros(gate.shape, bool)
    for rank in range(min(top_k, num_keys)):
        kept |= (head[:, None, None] == columns[..., rank, None]) & chosen[..., rank, None] & same[:, None]
    if causal:
        kept &= (k_place[:, None] <= q_place[:, :, None])[:, None]
    return jnp.swapaxes(indices, 1, 2), kept


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"], Int[Array, "B T N top_k"]]:
    """Output, log-sum-exp and selection; see `moba_attention`."""
    indices, kept = select(q, k, q_segments, k_segments, block_size=block_size, top_k=top_k, causal=causal)
    out, lse = attend(q, k, v, kept.any(axis=1), scale, kept)
    return out, lse, indices

"""One new token against a cache: scores of all centroids, then keys and values of the selected blocks alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.checks import check_heads, check_scale
from pallas_kernels.moba.centroids import CentroidCache, check_block_size
from pallas_kernels.moba.routing import choose


def moba_decode(
    q: Float[Array, "B 1 N H"],
    k_cache: Float[Array, "L B S K H"],
    v_cache: Float[Array, "L B S K H"],
    own_k: Float[Array, "B 1 K H"],
    own_v: Float[Array, "B 1 K H"],
    cache: CentroidCache,
    *,
    layer: int | Int[Array, ""],
    block_size: int,
    top_k: int,
    scale: float | None = None,
    return_selection: bool = False,
) -> Float[Array, "B 1 N H"] | tuple[Float[Array, "B 1 N H"], Int[Array, "B 1 N top_k"]]:
    """`moba_attention` for the token that follows the `cache.lengths` tokens of a cache, which it never writes.

    Reads all centroids, but keys and values of `top_k` blocks only. No gradient is defined. Afterwards the caller
    writes `own_k` and `own_v` at slot `cache.lengths[b]` and calls `append_centroids`.

    Args:
      q: the query of the new token; N a multiple of K.
      k_cache: keys of all layers, those of row b in slots 0..cache.lengths[b] - 1; what other slots hold never matters.
      v_cache: values of all layers.
      own_k: the key of the new token.
      own_v: its value.
      cache: the centroids of this layer's keys.
      layer: which of the L layers to read; may be traced.
      block_size: that of the centroids.
      top_k: blocks to select, the own one included.
      scale: of the scores of attention; None is H ** -0.5. Static.
      return_selection: also return the selection, as of `moba_select`.
    """
    for name, array in (("k_cache", k_cache), ("v_cache", v_cache)):
        if array.ndim != 5:
            raise ValueError(f"{name} must be [layers, batch, slots, kv_heads, head_dim]; got shape {array.shape}")
    one_k, one_v = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (k_cache, v_cache))
    check_heads(("q", q), ("k_cache", one_k), ("v_cache", one_v))
    check_heads(("q", q), ("own_k", own_k), ("own_v", own_v))
    check_block_size(block_size)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be a positive Python integer; got {top_k!r}")
    if q.shape[1] != 1 or own_k.shape[1] != 1:
        raise ValueError(f"q and own_k must hold one token; got shapes {q.shape} and {own_k.shape}")
    batch, _, num_heads, head_dim = q.shape
    num_slots, num_kv_heads = k_cache.shape[2:4]
    num_blocks = cache.centroids.shape[1]
    want = (batch, -(-num_slots // block_size), num_kv_heads, head_dim)
    if cache.centroids.shape != want or cache.centroids.dtype != q.dtype:
        got = f"{cache.centroids.dtype} of shape {cache.centroids.shape}"
        raise ValueError(f"the centroids of {num_slots} slots must be {q.dtype} of shape {want}; got {got}")
    scale = check_scale(scale, head_dim)
    precise = jnp.promote_types(q.dtype, jnp.float32)
    ranks = min(top_k - 1, num_blocks)
    layer = jnp.asarray(layer, jnp.int32)

    def one_head(q, own_k, own_v, centroids, length, row, head):
        """q [G, H], own_k and own_v [H], centroids [C, H] -> out [G, H], blocks [G, 1 + ranks]."""
        group = q.shape[0]
        own = jnp.full((group,), length // block_size)
        routed = choose(q, centroids, jnp.zeros_like(own), own, ranks) if ranks else jnp.zeros((group, 0), jnp.int32)
        blocks = jnp.concatenate([own[:, None], routed], axis=1)
        slots = (blocks[..., None] * block_size + jnp.arange(block_size)).reshape(group, -1)
        seen = jnp.repeat(blocks >= 0, block_size, axis=1) & (slots < length)
        at = (layer, row, jnp.where(seen, slots, 0), head)
        k, v = (jnp.where(seen[..., None], x[at], 0) for x in (k_cache, v_cache))
        scores = jnp.einsum("GH,GSH->GS", q, k, preferred_element_type=precise) * scale
        own_score = jnp.einsum("GH,H->G", q, own_k, preferred_element_type=precise)[:, None] * scale
        scores = jnp.concatenate([jnp.where(seen, scores, -jnp.inf), own_score], axis=1)
        p = jax.nn.softmax(scores, axis=1)
        out = jnp.einsum("GS,GSH->GH", p[:, :-1].astype(q.dtype), v, preferred_element_type=precise)
        return (out + p[:, -1:] * own_v).astype(q.dtype), blocks

    one_row = jax.vmap(one_head, in_axes=(0, 0, 0, 1, None, None, 0))
    grouped = q[:, 0].reshape(batch, num_kv_heads, -1, head_dim)
    rows, heads = jnp.arange(batch), jnp.arange(num_kv_heads)
    out, blocks = jax.vmap(one_row, in_axes=(0, 0, 0, 0, 0, 0, None))(
        grouped, own_k[:, 0], own_v[:, 0], cache.centroids, cache.lengths, rows, heads
    )
    out = out.reshape(q.shape)
    if not return_selection:
        return out
    blocks = jnp.pad(blocks, [(0, 0)] * 3 + [(0, top_k - blocks.shape[3])], constant_values=-1)
    return out, blocks.reshape(batch, 1, num_heads, top_k)

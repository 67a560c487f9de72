"""Portable decode attention: the cache is read chunk by chunk in place, as far as the longest row reaches.

Each chunk is a `dynamic_slice` `[1, B, chunk, K, H]` of the stacked cache, so the only copy is one chunk (on a CPU it
stays in the caches). The trip count is a run-time value, ceil(max(kv_lengths) / chunk); a window without sinks also
raises the first chunk. A cache of one chunk takes no loop. Queries beyond `tile_t` are walked tile by tile, their own
keys over the live tiles of `own_mask`. Arithmetic and numerics are those of `attention/xla.py`; of a cache of codes
one chunk at a time is converted to the dtype of `q`, which is exact, and its scales multiply scores and probabilities.

With skipped tiles the chunks hold whole rounds of the chains and carry what each row has seen in each chain. Nothing
becomes cheaper here: a skipped tile is only left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.skip import Skip
from pallas_kernels.attention.xla import Partial, finish, merge
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


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Queries per tile, cache slots per chunk, and up to which capacity the whole cache is one chunk."""

    tile_t: int
    chunk: int
    one_chunk: int


def default_tiling(q_shape: tuple[int, ...], num_kv_heads: int, platform: str) -> Tiling:
    """A tiling by measurement (see README.md): changes speed and memory only."""
    batch, num_queries, num_heads, head_dim = q_shape
    tile_t = min(num_queries, 128)
    slot = max(1, batch * num_kv_heads * head_dim)  # elements of all keys in one slot
    if platform == "cpu":
        # A chunk of keys should stay in the second-level cache between its copy and its use.
        chunk = _power_of_two(2**17 / slot, 64, 256)
    else:
        # A run-time trip count costs a GPU one round trip to the host per chunk, hence few and large chunks.
        rows = max(1, batch * num_heads * tile_t)
        chunk = _power_of_two(min(2**25 / slot, 2**26 / rows), 128, 4096)
    return Tiling(tile_t, chunk=chunk, one_chunk=chunk)


def _power_of_two(x: float, least: int, most: int) -> int:
    return 2 ** int(np.clip(np.log2(x), np.log2(least), np.log2(most)))


def run(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
    skip: Skip | None = None,
    tiling: Tiling | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles of the cache were kept; see `decode_attention`."""
    batch, num_queries, num_heads, head_dim = q.shape
    capacity, num_kv_heads = k_cache.shape[2:4]
    if tiling is None:
        tiling = default_tiling(q.shape, num_kv_heads, jax.default_backend())
    if skip is not None:  # all queries vote together, and a chunk ends where all chains do
        round_width = skip.tile.width * skip.tile.chains
        chunk = -(-tiling.chunk // round_width) * round_width
        tiling = Tiling(num_queries, chunk=chunk, one_chunk=max(chunk, tiling.one_chunk))
    tile_t = min(tiling.tile_t, num_queries)
    tiles = -(-num_queries // tile_t)
    group = num_heads // num_kv_heads
    # [tiles, B, K, G * tile_t, H] and [tiles, B, tile_t]; padded queries are cut off at the end
    padding = tiles * tile_t - num_queries
    q_tiles = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else q
    q_tiles = q_tiles.reshape(batch, tiles, tile_t, num_kv_heads, group, head_dim)
    q_tiles = jnp.moveaxis(q_tiles, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    q_tiles = q_tiles.reshape(tiles, batch, num_kv_heads, group * tile_t, head_dim)
    positions = jnp.pad(operands.q_positions, ((0, 0), (0, padding)), mode="edge")
    position_tiles = jnp.swapaxes(positions.reshape(batch, tiles, tile_t), 0, 1)
    chunk = capacity if capacity <= tiling.one_chunk else min(tiling.chunk, capacity)

    keep = None

    def attend(index: Array | int, q_tile: Array, position: Array) -> tuple[Array, Array]:
        nonlocal keep
        read = functools.partial(
            _read_chunk, q_tile, position, k_cache, v_cache, operands=operands, scale=scale, chunk=chunk
        )
        cached = lambda c: read(c).weigh(q_tile.dtype)  # noqa: E731
        own = functools.partial(
            _own_tile, q_tile, position, index, operands=operands, own_mask=own_mask, scale=scale, tile_t=tile_t
        )
        if skip is not None:
            part, keep = _skipping(q_tile, read, position, operands, skip, capacity, chunk)
        elif chunk == capacity:
            part = cached(0)
        else:
            first, last = _chunk_range(position, operands, capacity, chunk)
            part = jax.lax.fori_loop(first, last, lambda c, part: merge(part, cached(c)), _nothing(q_tile))
        if operands.own_k is None:
            return finish(part)
        if tiles == 1:
            return finish(merge(part, own(0)))
        schedule = own_mask.schedule(num_queries, num_queries, tile_t, tile_t)
        table = np.zeros((tiles, max(1, *(len(row) for row in schedule.q_to_k))), np.int32)
        for row, live in zip(table, schedule.q_to_k, strict=True):
            row[: len(live)] = live
        counts = np.asarray([len(live) for live in schedule.q_to_k], np.int32)
        visit = jnp.asarray(table)[index]
        part = jax.lax.fori_loop(0, jnp.asarray(counts)[index], lambda n, part: merge(part, own(visit[n])), part)
        return finish(part)

    if tiles == 1:
        out, lse = (x[None] for x in attend(0, q_tiles[0], position_tiles[0]))
    else:
        out, lse = jax.lax.map(lambda x: attend(*x), (jnp.arange(tiles), q_tiles, position_tiles))
    # out [tiles, B, K, G * tile_t, H], lse [tiles, B, K, G * tile_t]
    out = out.reshape(tiles, batch, num_kv_heads, group, tile_t, head_dim)
    out = jnp.moveaxis(out, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)).reshape(batch, tiles * tile_t, num_heads, head_dim)
    lse = jnp.moveaxis(lse.reshape(tiles, batch, num_heads, tile_t), 0, 2)
    lse = lse.reshape(batch, num_heads, tiles * tile_t)
    out, lse = out[:, :num_queries].astype(q.dtype), lse[:, :, :num_queries]
    return (out, lse) if keep is None else (out, lse, keep)


def _nothing(q_tile: Array) -> Partial:
    zeros = jnp.zeros_like(q_tile, jnp.promote_types(q_tile.dtype, jnp.float32))
    return Partial(top=jnp.full_like(zeros[..., 0], -jnp.inf), total=zeros[..., 0], out=zeros)


def _chunk_range(position: Array, operands: Operands, capacity: int, chunk: int) -> tuple[Array | int, Array]:
    """First chunk and one past the last that some row can see."""
    used = jnp.minimum(operands.kv_lengths.max(initial=0), capacity)
    last = (used + chunk - 1) // chunk
    if operands.window is None or operands.k_positions is not None or not isinstance(operands.num_sinks, int):
        return jnp.zeros_like(last), last
    if operands.num_sinks:
        return jnp.zeros_like(last), last
    # Slot j holds position j: nothing below the farthest reach of the window matters.
    reach = position.min(initial=np.iinfo(np.int32).max) - operands.window + 1
    return jnp.clip(reach // chunk, 0, last), last


def _near(position: Array, k_position: Array, operands: Operands) -> Array:
    """[B, tile_t] x [1 | B, S] -> bool [B, tile_t, S]: inside the window, or a sink."""
    assert operands.window is not None
    near = position[:, :, None] - k_position[:, None] < operands.window
    return near | (k_position < operands.num_sinks)[:, None]


def _scores(q_tile: Array, k: Array, seen: Array, scale: float, k_scale: Array | None = None) -> Array:
    """Scores [B, K, M, S] of q_tile [B, K, M, H] and k [B, S, K, H]; -inf where not `seen` [B, M / G, S].

    Codes k come with their scales, float32 [#B, K, #S].
    """
    precise = jnp.promote_types(q_tile.dtype, jnp.float32)
    k = k.astype(q_tile.dtype)
    scores = jnp.einsum("BKMH,BSKH->BKMS", q_tile, k, preferred_element_type=precise) * scale
    if k_scale is not None:
        scores = scores * k_scale[:, :, None]
    group = q_tile.shape[2] // seen.shape[1]
    return jnp.where(jnp.tile(seen, (1, group, 1))[:, None], scores, -jnp.inf)


def _weigh(scores: Array, v: Array, filled: Array, dtype: Any, v_scale: Array | None = None) -> Partial:
    """Softmax of scores [B, K, M, S] over v [B, S, K, H]; NaN in slots that are not `filled` [B, S] cannot spread."""
    v = jnp.where(filled[:, :, None, None], v, 0).astype(dtype)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top)[..., None])
    scaled = weights
    if v_scale is not None:
        scaled = weights * jnp.where(filled[:, None], v_scale, 0.0)[:, :, None]
    out = jnp.einsum("BKMS,BSKH->BKMH", scaled.astype(dtype), v, preferred_element_type=scores.dtype)
    return Partial(top, weights.sum(axis=-1), out)


def _scale_chunk(scales: Array, layer: Array, start: Array, chunk: int) -> Array:
    """Scales of one chunk of a layer as float32 `[#B, K, #chunk]`."""
    if scales.ndim == 2:
        here = jax.lax.dynamic_index_in_dim(scales, layer, keepdims=False)[None, :, None]
    else:
        _, batch, num_kv_heads, _ = scales.shape
        here = jax.lax.dynamic_slice(scales, (layer, 0, 0, start), (1, batch, num_kv_heads, chunk))[0]
    return here.astype(jnp.float32)


class _Chunk(NamedTuple):
    """Scores of one chunk of the cache and what it takes to weigh its values with them."""

    scores: Array  # [B, K, M, S]
    v: Array  # [B, S, K, H]
    filled: Array  # [B, S]
    v_scale: Array | None  # [#B, K, #S]

    def weigh(self, dtype: Any) -> Partial:
        return _weigh(self.scores, self.v, self.filled, dtype, self.v_scale)


def _read_chunk(
    q_tile: Array,
    position: Array,
    k_cache: Array,
    v_cache: Array,
    index: Array | int,
    *,
    operands: Operands,
    scale: float,
    chunk: int,
) -> _Chunk:
    """Scores of cache slots `index * chunk ...`; the last chunk starts early, without counting a slot twice."""
    _, batch, capacity, num_kv_heads, head_dim = k_cache.shape
    start = jnp.minimum(index * chunk, capacity - chunk)
    at = (operands.layer, 0, start, 0, 0)
    k, v = (jax.lax.dynamic_slice(x, at, (1, batch, chunk, num_kv_heads, head_dim))[0] for x in (k_cache, v_cache))
    # Without a fixed layout XLA gives the whole cache, not the chunk, the layout that the matmul likes: on a GPU that
    # is a transposed copy of all layers in every step.
    rows = Layout(major_to_minor=(0, 1, 2, 3))
    k, v = (with_layout_constraint(x, rows) for x in (k, v))
    slots = start + jnp.arange(chunk)
    filled = (slots >= index * chunk) & (slots < operands.kv_lengths[:, None])
    k_position = slots[None]
    if operands.k_positions is not None:
        k_position = jax.lax.dynamic_slice_in_dim(operands.k_positions, start, chunk, axis=1)
        filled &= k_position >= 0
    seen = filled[:, None]
    if operands.window is not None:
        seen &= _near(position, k_position, operands)
    seen = jnp.broadcast_to(seen, (batch, position.shape[1], chunk))
    k_scale, v_scale = (
        None if x is None else _scale_chunk(x, operands.layer, start, chunk)
        for x in (operands.k_scale, operands.v_scale)
    )
    return _Chunk(_scores(q_tile, k, seen, scale, k_scale), v, filled, v_scale)


def _skipping(
    q_tile: Array,
    read: Callable[[Array | int], _Chunk],
    position: Array,
    operands: Operands,
    skip: Skip,
    capacity: int,
    chunk: int,
) -> tuple[Partial, Array]:
    """Attention to the kept tiles of the cache, and which ones they are, bool [B, K, tiles]."""
    batch, num_kv_heads, num_rows, _ = q_tile.shape
    width, chains = skip.tile.width, skip.tile.chains
    rounds = -(-chunk // (width * chains))  # of one chunk; a round is one tile of each chain
    log_threshold = skip.log_threshold[:, None, None, None]

    def visit(index, state):
        part, before, keep = state
        here = read(index)
        # Slots that an earlier chunk has seen come first; tiles start at slot `index * chunk`.
        shift = index * chunk - jnp.minimum(index * chunk, capacity - chunk)
        missing = jnp.full((*here.scores.shape[:3], rounds * chains * width), -jnp.inf, here.scores.dtype)
        aligned = jnp.concatenate([here.scores, missing], axis=-1)
        aligned = jax.lax.dynamic_slice_in_dim(aligned, shift, missing.shape[-1], axis=-1)
        top = aligned.reshape(batch, num_kv_heads, num_rows, rounds, chains, width).max(axis=-1)
        highest = jnp.maximum(jax.lax.cummax(top, axis=3), before[:, :, :, None])
        earlier = jnp.concatenate([before[:, :, :, None], highest[:, :, :, :-1]], axis=3)
        margin = rule.row_margin(top, earlier).max(axis=2)
        kept = rule.keeps(margin, log_threshold).reshape(batch, num_kv_heads, rounds * chains)
        tile = jnp.maximum(jnp.arange(chunk) - shift, 0) // width
        scores = jnp.where(kept[:, :, None, tile], here.scores, -jnp.inf)
        part = merge(part, here._replace(scores=scores).weigh(q_tile.dtype))
        keep = jax.lax.dynamic_update_slice_in_dim(keep, kept, index * rounds * chains, axis=2)
        return part, highest[:, :, :, -1], keep

    part = _nothing(q_tile)
    before = jnp.full((batch, num_kv_heads, num_rows, chains), -jnp.inf, part.top.dtype)
    keep = jnp.zeros((batch, num_kv_heads, -(-capacity // chunk) * rounds * chains), bool)
    chunks = (0, 1) if chunk == capacity else _chunk_range(position, operands, capacity, chunk)
    part, _, keep = jax.lax.fori_loop(chunks[0], chunks[1], visit, (part, before, keep))
    return part, keep[:, :, : -(-capacity // width)]


def _own_tile(
    q_tile: Array,
    position: Array,
    q_index: Array | int,
    k_index: Array | int,
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
    tile_t: int,
) -> Partial:
    """Attention of query tile `q_index` to tile `k_index` of the new tokens' own keys."""
    assert operands.own_k is not None and operands.own_v is not None
    batch, num_queries = operands.own_k.shape[:2]
    start = jnp.minimum(k_index * tile_t, num_queries - tile_t)  # the last tile starts early, as in the cache
    k, v, k_position = (
        jax.lax.dynamic_slice_in_dim(x, start, tile_t, axis=1)
        for x in (operands.own_k, operands.own_v, operands.q_positions)
    )
    key = start + jnp.arange(tile_t)
    filled = jnp.broadcast_to(key >= k_index * tile_t, (batch, tile_t))
    if operands.own_lengths is not None:
        filled &= key < operands.own_lengths[:, None]
    query = q_index * tile_t + jnp.arange(tile_t)
    seen = filled[:, None] & own_mask.allowed(query[:, None], key[None])
    if operands.window is not None:
        seen &= _near(position, k_position, operands)
    return _weigh(_scores(q_tile, k, seen, scale), v, filled, q_tile.dtype)

"""What a call's mask and run-time limits become before a kernel starts: padded rows of integers and a table of runs."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.limits import Limits
from pallas_kernels.masks import BlockCausal, Causal, Full, Mask, PrefixBidirectional
from pallas_kernels.tile_runs import TileRuns, all_runs, limit_runs, mask_runs, tile_limits

FAR = 2**30  # beyond every index and position


@dataclasses.dataclass(frozen=True)
class Operands:
    """A call made ready for one kernel: cleaned limits, padded to whole tiles.

    Negative segments are -1 for keys and -2 for queries, so that they equal nothing.
    """

    q_segments: Int[Array, "B Tp"] | None
    k_segments: Int[Array, "B Sp"] | None
    q_positions: Int[Array, "B Tp"] | None
    k_positions: Int[Array, "B Sp"] | None
    kv_lengths: Int[Array, "B"] | None

    def arrays(self) -> dict[str, Array | None]:
        """By name, as a kernel takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def prepare(
    mask: Mask,
    limits: Limits,
    num_queries: int,
    num_keys: int,
    *,
    tile_q: int,
    tile_k: int,
    by_key: bool = False,
    ascending: bool = False,
) -> tuple[Operands, TileRuns]:
    """Operands and visits of a kernel over tiles of `tile_q x tile_k`.

    The table has one line per query tile listing key tiles, or with `by_key` one per key tile listing query tiles.
    Full tiles come before partial ones; with `ascending` the index of the tile decides alone, at the price that all
    tiles count as partial where the two orders differ.
    """
    q_segments, k_segments, q_positions, k_positions, kv_lengths = limits
    index = jnp.arange(num_keys, dtype=jnp.int32)[None]
    if q_segments is not None and k_segments is not None:
        q_segments = _pad_to(jnp.where(q_segments < 0, -2, q_segments), tile_q)
        k_segments = _pad_to(jnp.where(k_segments < 0, -1, k_segments), tile_k)
    if q_positions is not None or k_positions is not None:
        batch = (k_positions if q_positions is None else q_positions).shape[0]  # type: ignore[union-attr]
        if q_positions is None:
            q_index = jnp.arange(num_queries, dtype=jnp.int32) + mask.query_offset(num_queries, num_keys)
            q_positions = jnp.broadcast_to(q_index[None], (batch, num_queries))
        if k_positions is None:
            k_positions = jnp.broadcast_to(index, (batch, num_keys))
        if kv_lengths is not None:
            k_positions = jnp.where(index < kv_lengths[:, None], k_positions, -1)
        q_positions = _pad_to(q_positions, tile_q)
        # Slots past the end must stay unseen, so they cannot repeat the last position.
        k_positions = jnp.pad(k_positions, ((0, 0), (0, -num_keys % tile_k)), constant_values=-1)
    operands = Operands(q_segments, k_segments, q_positions, k_positions, kv_lengths)
    # These show each query one run of keys from the first one on, so its last tiles are the partial ones.
    in_order = isinstance(mask, Full | Causal | BlockCausal | PrefixBidirectional) and q_segments is None
    all_partial = ascending and not in_order
    return operands, _runs(mask, operands, num_queries, num_keys, tile_q, tile_k, by_key, all_partial)


def _runs(
    mask: Mask,
    operands: Operands,
    num_queries: int,
    num_keys: int,
    tile_q: int,
    tile_k: int,
    by_key: bool,
    all_partial: bool,
) -> TileRuns:
    """The tiles to visit, after all limits."""
    num_q_tiles, num_k_tiles = -(-num_queries // tile_q), -(-num_keys // tile_k)
    live = full = None  # [B or 1, query tiles, key tiles]

    def both(flags, more):
        return more if flags is None else flags & more

    if operands.q_positions is None or operands.k_positions is None:
        runs = mask_runs(mask, num_queries, num_keys, tile_q, tile_k, by_key=by_key, all_partial=all_partial)
        if operands.kv_lengths is not None:
            end = (operands.kv_lengths[:, None] - jnp.arange(num_k_tiles) * tile_k)[:, None]
            live, full = end > 0, end >= tile_k
    else:
        runs = all_runs(*((num_k_tiles, num_q_tiles) if by_key else (num_q_tiles, num_k_tiles)))
        k_min, k_max = (x[:, None] for x in _extremes(operands.k_positions, tile_k))
        live = jnp.zeros((1, 1, 1), bool)
        for start, stop in mask.key_intervals(operands.q_positions, FAR):
            first, _ = _extremes(start, tile_q)
            _, last = _extremes(stop, tile_q)
            live |= (first[:, :, None] <= k_max) & (last[:, :, None] > k_min)
        live &= k_max >= 0
        full = jnp.zeros_like(live)
    if operands.q_segments is not None and operands.k_segments is not None:
        q_min, q_max = (x[:, :, None] for x in _extremes(operands.q_segments, tile_q))
        k_min, k_max = (x[:, None] for x in _extremes(operands.k_segments, tile_k))
        full = both(full, (q_min == q_max) & (k_min == k_max) & (q_min == k_min))
        # Empty slots count for nothing: the range of a tile that has some would reach over all segments below.
        q_min, k_min = (
            _extremes(jnp.where(x < 0, jnp.iinfo(jnp.int32).max, x), tile)[0]
            for x, tile in ((operands.q_segments, tile_q), (operands.k_segments, tile_k))
        )
        live = both(live, (q_min[:, :, None] <= k_max) & (k_min[:, None] <= q_max))
    if live is None or full is None:
        return runs
    shape = (live.shape[0], num_q_tiles, num_k_tiles)
    live, full = jnp.broadcast_to(live, shape), jnp.broadcast_to(full, shape)
    if by_key:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    return limit_runs(runs, tile_limits(live, full))


def clean_slots(
    x: Float[Array, "B S K H"], mask: Mask, limits: Limits, num_queries: int, num_keys: int
) -> Float[Array, "B S K H"]:
    """Zeroes the key slots that no query sees, by selection: a weight of 0 does not stop a NaN that one holds."""
    empty = None  # bool [#B, S]

    def also_empty(flags):
        return flags if empty is None else empty | flags

    if limits.kv_lengths is not None:
        empty = also_empty(jnp.arange(num_keys)[None] >= limits.kv_lengths[:, None])
    if limits.q_segments is not None and limits.k_segments is not None:
        empty = also_empty(limits.k_segments < 0)
    if limits.k_positions is not None:
        empty = also_empty(limits.k_positions < 0)
    if limits.q_positions is None and limits.k_positions is None:
        unseen, _ = _unseen(mask, num_queries, num_keys)
        if unseen.any():
            empty = also_empty(jnp.asarray(unseen)[None])
    return x if empty is None else jnp.where(empty[:, :, None, None], 0, x)


def some_query_sees_nothing(mask: Mask, limits: Limits, num_queries: int, num_keys: int) -> bool:
    """Whether that may be; known for certain only without run-time limits."""
    return any(limit is not None for limit in limits) or bool(_unseen(mask, num_queries, num_keys)[1].any())


@functools.lru_cache(maxsize=256)
def _unseen(mask: Mask, num_queries: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Bool `[S]`: keys that the mask shows to no query (a window over more keys than queries has some); bool `[T]`:
    queries to which it shows none (causal with more queries than keys has some)."""
    edges = np.zeros(num_keys + 1, np.int64)
    blind = np.ones(num_queries, bool)
    q_index = np.arange(num_queries) + mask.query_offset(num_queries, num_keys)
    for start, stop in mask.key_intervals(q_index, num_keys):
        start, stop = np.clip(start, 0, num_keys), np.clip(stop, 0, num_keys)
        nonempty = start < stop
        blind &= ~nonempty
        np.add.at(edges, start[nonempty], 1)
        np.add.at(edges, stop[nonempty], -1)
    return np.cumsum(edges)[:-1] == 0, blind


def pad_tokens(array: Float[Array, "B L N H"]) -> Float[Array, "B Lp N H"]:
    """Pads with zeros to a multiple of 8 tokens, the rows of one swizzle atom."""
    missing = -array.shape[1] % 8
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array


def _pad_to(array: Array, multiple: int) -> Array:
    """Pads the last axis with its last value up to a multiple."""
    missing = -array.shape[-1] % multiple
    return jnp.pad(array, ((0, 0), (0, missing)), mode="edge") if missing else array


def _extremes(array: Array, tile: int) -> tuple[Array, Array]:
    """Minimum and maximum of each tile of the (padded) last axis."""
    tiled = array.reshape(array.shape[0], -1, tile)
    return tiled.min(axis=-1), tiled.max(axis=-1)

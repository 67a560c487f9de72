"""Portable flash attention: plain XLA operations over the live tiles of the mask, both directions.

Layout: queries are cut into tiles `[nq, B, K, M, H]` whose M = G * tile_q rows hold all query heads of one key head,
so that grouped heads share K and V without a copy; keys and values into tiles `[nk, B, K, tile_k, H]`. A static list
of (query tile, key tile) pairs is walked by `lax.scan`, `lanes` pairs at a time; the pairs of a step differ in both
query and key tile, so their results go to different accumulators. Pairs that need no masking come first and skip the
predicate. Nothing larger than `B * N * lanes * tile_q * tile_k` is ever held besides linear-size arrays.

With tiles to skip (`skip.py`) the pairs of a query tile come in ascending order instead, all with the predicate. A step
holds whole skip tiles, decides them one after the other, and drops the scores of the skipped ones: the exact result of
the rule, forward and backward, in no less time than dense. It also holds one flag per pair of skip tiles.

Numerics: scores and softmax in float32 with natural exponentials; the second matmul reads probabilities rounded to
the input dtype; all sums over keys or queries accumulate in float32.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip, SkipTile
from pallas_kernels.masks import Mask


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the score matrix is cut: tile sizes and the number of tile pairs processed at once."""

    tile_q: int
    tile_k: int
    lanes: int = 1


def default_tiling(batch: int, heads: int, num_queries: int, num_keys: int, platform: str) -> Tiling:
    """A tiling by measurement (see README.md): changes speed and memory only."""
    # Scores of one step. On a CPU they should stay in the caches; a GPU needs many of them to be busy at all.
    budget, tile = (3 * 2**18, 256) if platform == "cpu" else (2**26, 512)
    while tile > 64 and batch * heads * min(tile, num_queries) * min(tile, num_keys) > budget:
        tile //= 2
    tile_q, tile_k = _even(num_queries, tile), _even(num_keys, tile)
    lanes = 1
    if platform != "cpu":
        lanes = max(1, min(-(-num_queries // tile_q), budget // max(1, batch * heads * tile_q * tile_k)))
    return Tiling(tile_q, tile_k, lanes)


def _even(length: int, most: int) -> int:
    """Tile size that cuts `length` into as few tiles of at most `most` as possible, of nearly equal size."""
    count = -(-length // most)
    size = -(-length // count)
    return size if count == 1 else min(most, -(-size // 16) * 16)


def run(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    limits: Limits,
    scale: float,
    skip: Skip | None = None,
    tiling: Tiling | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles were kept; see `flash_attention`."""
    tile = None if skip is None else skip.tile
    static = _Static(mask, scale, _tiling(q.shape, k.shape[1], tile, tiling), tile)
    out, lse, keep = _attention(static, q, k, v, limits, None if skip is None else skip.log_threshold)
    return (out, lse) if keep is None else (out, lse, keep)


def _tiling(q_shape: tuple[int, ...], num_keys: int, tile: SkipTile | None, tiling: Tiling | None) -> Tiling:
    """The tiling of a call: whole skip tiles, and no more lanes than there are tiles."""
    batch, num_queries, num_heads, _ = q_shape
    if tiling is None:
        tiling = default_tiling(batch, num_heads, num_queries, num_keys, jax.default_backend())
    tile_q, tile_k = tiling.tile_q, tiling.tile_k
    if tile is not None:
        tile_q += -tile_q % tile.rows
        tile_k += -tile_k % tile.width
    most = min(-(-num_queries // tile_q), -(-num_keys // tile_k))
    return Tiling(tile_q, tile_k, min(tiling.lanes, most))


class _Static(NamedTuple):
    mask: Mask
    scale: float
    tiling: Tiling
    tile: SkipTile | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static, q: Array, k: Array, v: Array, limits: Limits, log_threshold: Array | None
) -> tuple[Array, Array, Array | None]:
    return _forward(static, q, k, v, limits, log_threshold)


def _attention_fwd(static, q, k, v, limits, log_threshold):
    # A rematerialisation policy that keeps "attention" then need not run the forward pass again.
    results = jax.tree.map(lambda x: checkpoint_name(x, "attention"), _forward(static, q, k, v, limits, log_threshold))
    return results, (q, k, v, limits, *results)


def _attention_bwd(static, residuals, cotangents):
    dq, dk, dv = _first_order(static, *residuals, *cotangents[:2])
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(static: _Static, q, k, v, limits, out, lse, keep, d_out, d_lse):
    return _backward(static, q, k, v, limits, out, lse, keep, d_out, d_lse)


@_first_order.defjvp
def _second_order(static, primals, tangents):
    raise NotImplementedError(
        'flash_attention "xla" has no second derivative: differentiate implementation="reference" instead'
    )


# ---------------------------------------------------------------------------------------------------------------
# Tiles


class _Shape(NamedTuple):
    """Sizes of the problem and of its tiles."""

    batch: int
    num_queries: int
    num_keys: int
    num_kv_heads: int
    group: int  # query heads per key head
    head_dim: int
    tile_q: int
    tile_k: int

    @property
    def q_tiles(self) -> int:
        return -(-self.num_queries // self.tile_q)

    @property
    def k_tiles(self) -> int:
        return -(-self.num_keys // self.tile_k)


def _shape(q: Array, k: Array, tiling: Tiling) -> _Shape:
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    return _Shape(batch, num_queries, num_keys, num_kv_heads, group, head_dim, tiling.tile_q, tiling.tile_k)


def _pad(x: Array, axis: int, size: int, value: int = 0) -> Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _cut_queries(x: Array, shape: _Shape) -> Array:
    """[B, T, N, ...] -> [nq, B, K, G * tile_q, ...], zeros beyond T."""
    x = _pad(x, 1, shape.q_tiles * shape.tile_q)
    rest = x.shape[3:]
    x = x.reshape(shape.batch, shape.q_tiles, shape.tile_q, shape.num_kv_heads, shape.group, *rest)
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    return x.reshape(shape.q_tiles, shape.batch, shape.num_kv_heads, shape.group * shape.tile_q, *rest)


def _join_queries(x: Array, shape: _Shape) -> Array:
    """[nq, B, K, G * tile_q, ...] -> [B, T, N, ...]."""
    rest = x.shape[4:]
    x = x.reshape(shape.q_tiles, shape.batch, shape.num_kv_heads, shape.group, shape.tile_q, *rest)
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
    x = x.reshape(shape.batch, shape.q_tiles * shape.tile_q, shape.num_kv_heads * shape.group, *rest)
    return x[:, : shape.num_queries]


def _cut_keys(x: Array, shape: _Shape) -> Array:
    """[B, S, K, H] -> [nk, B, K, tile_k, H], zeros beyond S; H may be the values' own head dim."""
    x = _pad(x, 1, shape.k_tiles * shape.tile_k)
    x = x.reshape(shape.batch, shape.k_tiles, shape.tile_k, shape.num_kv_heads, x.shape[-1])
    return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))


def _join_keys(x: Array, shape: _Shape) -> Array:
    """[nk, B, K, tile_k, H] -> [B, S, K, H]."""
    x = jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))
    x = x.reshape(shape.batch, shape.k_tiles * shape.tile_k, shape.num_kv_heads, x.shape[-1])
    return x[:, : shape.num_keys]


def _cut_rows(x: Array, tiles: int, tile: int, value: int) -> Array:
    """[B, length] -> [tiles, B, tile] with `value` beyond the length."""
    x = _pad(x, 1, tiles * tile, value)
    return jnp.swapaxes(x.reshape(x.shape[0], tiles, tile), 0, 1)


class _Sight:
    """Who sees whom inside a tile, from the mask's predicate and the limits of the call."""

    def __init__(self, mask: Mask, limits: Limits, shape: _Shape):
        self.mask, self.shape = mask, shape
        self.offset = mask.query_offset(shape.num_queries, shape.num_keys)
        self.has_positions = limits.q_positions is not None or limits.k_positions is not None
        self.is_static = all(limit is None for limit in limits)
        q_rows = functools.partial(_cut_rows, tiles=shape.q_tiles, tile=shape.tile_q)
        k_rows = functools.partial(_cut_rows, tiles=shape.k_tiles, tile=shape.tile_k)
        self.rows: dict[str, Array] = {}  # [tiles, B, tile] each
        if limits.q_positions is not None:
            self.rows["q_position"] = q_rows(limits.q_positions, value=0)
        if limits.k_positions is not None:
            self.rows["k_position"] = k_rows(limits.k_positions, value=-1)
        if limits.q_segments is not None and limits.k_segments is not None:
            self.rows["q_segment"] = q_rows(limits.q_segments, value=-1)
            self.rows["k_segment"] = k_rows(limits.k_segments, value=-1)
        self.filled: Array | None = None  # [B, S] bool: slots that are not empty
        for limit in (limits.k_positions, limits.k_segments):
            if limit is not None:
                self.filled = limit >= 0 if self.filled is None else self.filled & (limit >= 0)
        if limits.kv_lengths is not None:
            within = jnp.arange(shape.num_keys) < limits.kv_lengths[:, None]
            self.filled = within if self.filled is None else self.filled & within
        if self.filled is not None:
            self.rows["filled"] = k_rows(self.filled, value=False)

    def real_queries(self, q_tile: Array) -> Array:
        """Bool [P, 1, tile_q, 1]: rows that are queries, not padding."""
        rows = (q_tile * self.shape.tile_q)[:, None] + jnp.arange(self.shape.tile_q)
        return (rows < self.shape.num_queries)[:, None, :, None]

    def clean_keys(self, x: Array) -> Array:
        """Zeroes empty slots of [B, S, K, H] by selection, so that NaN in them cannot spread."""
        return x if self.filled is None else jnp.where(self.filled[:, :, None, None], x, 0)

    def tile(self, q_tile: Array, k_tile: Array) -> Array:
        """Bool [P, 1 | B, tile_q, tile_k] for P pairs of tile indices."""
        shape = self.shape
        q_index = (q_tile * shape.tile_q)[:, None, None] + jnp.arange(shape.tile_q) + self.offset  # [P, 1, tile_q]
        k_index = (k_tile * shape.tile_k)[:, None, None] + jnp.arange(shape.tile_k)
        pick = {name: _pick(rows, q_tile if name[0] == "q" else k_tile) for name, rows in self.rows.items()}
        allowed = self.mask.allowed(
            pick.get("q_position", q_index)[..., :, None], pick.get("k_position", k_index)[..., None, :]
        )
        if "filled" in pick:
            allowed &= pick["filled"][..., None, :]
        elif shape.num_keys % shape.tile_k:
            allowed &= (k_index < shape.num_keys)[..., None, :]
        if "q_segment" in pick:
            allowed &= pick["q_segment"][..., :, None] == pick["k_segment"][..., None, :]
        return allowed


def _pick(x: Array, index: Array) -> Array:
    """Tiles `index` [P] of x [tiles, ...]; one index becomes a plain slice."""
    if x.shape[0] == 1:
        return x
    if index.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(x, index[0], 1)
    return x.at[index].get(mode="clip", unique_indices=True)


def _put(x: Array, index: Array, value: Array) -> Array:
    """Writes tiles `index` [P] of x; an index beyond the end (an idle lane) is dropped."""
    if x.shape[0] == 1:
        return value
    if index.shape[0] == 1:
        return jax.lax.dynamic_update_slice_in_dim(x, value, index[0], 0)
    return x.at[index].set(value, mode="drop", unique_indices=True)


# ---------------------------------------------------------------------------------------------------------------
# The walk over live pairs


@functools.lru_cache(maxsize=256)
def _steps(
    mask: Mask, shape: _Shape, lanes: int, is_static: bool, has_positions: bool, ordered: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tile pairs to visit as int32 [steps, lanes, 2]: those without masking, and those with.

    Idle lanes hold indices beyond the last tile. With positions the mask says nothing about indices, so every pair
    is visited and masked; with other limits the mask's live pairs are visited, all masked. `ordered` makes the key
    tiles of each query tile ascend, and masks them all.
    """
    if has_positions:
        live = [(i, j) for i in range(shape.q_tiles) for j in range(shape.k_tiles)]
        return _spread([], shape, lanes), _spread(live, shape, lanes, ordered)
    schedule = mask.schedule(shape.num_queries, shape.num_keys, shape.tile_q, shape.tile_k)
    live = [(i, int(j)) for i, tiles in enumerate(schedule.q_to_k) for j in tiles]
    if ordered:
        return _spread([], shape, lanes), _spread(live, shape, lanes, ordered)
    masked = [pair for pair in live if schedule.is_partial[pair] or not is_static]
    plain = [pair for pair in live if not schedule.is_partial[pair] and is_static]
    return _spread(plain, shape, lanes), _spread(masked, shape, lanes)


def _spread(pairs: list[tuple[int, int]], shape: _Shape, lanes: int, ordered: bool = False) -> np.ndarray:
    """Groups pairs into steps of `lanes` in which no query tile and no key tile occurs twice.

    `ordered` keeps the given order of the pairs of each query tile.
    """
    if lanes == 1:
        return np.asarray(pairs, np.int32).reshape(-1, 1, 2)
    waiting: dict[int, list[int]] = {}
    for i, j in pairs:
        waiting.setdefault(i, []).append(j)
    steps = []
    while waiting:
        step: list[tuple[int, int]] = []
        taken: set[int] = set()
        for i in sorted(waiting, key=lambda i: -len(waiting[i])):  # the longest rows first
            free = (j for j in waiting[i][: 1 if ordered else None] if j not in taken)
            if (j := next(free, -1)) < 0:
                continue
            taken.add(j)
            waiting[i].remove(j)
            if not waiting[i]:
                del waiting[i]
            step.append((i, j))
            if len(step) == lanes:
                break
        idle = [(shape.q_tiles + n, shape.k_tiles + n) for n in range(lanes - len(step))]
        steps.append(step + idle)
    return np.asarray(steps, np.int32).reshape(-1, lanes, 2)


def _walk(body: Any, state: Any, shape: _Shape, sight: _Sight, lanes: int, ordered: bool = False) -> Any:
    """Folds `body(state, q_tile [P], k_tile [P], seen or None)` over all live pairs."""
    plain, masked = _steps(sight.mask, shape, lanes, sight.is_static, sight.has_positions, ordered)
    for steps, is_masked in ((plain, False), (masked, True)):

        def step(state, pair, is_masked=is_masked):
            q_tile, k_tile = pair[:, 0], pair[:, 1]
            return body(state, q_tile, k_tile, sight.tile(q_tile, k_tile) if is_masked else None), None

        if len(steps) == 1:
            state, _ = step(state, jnp.asarray(steps[0]))
        elif len(steps):
            state, _ = jax.lax.scan(step, state, jnp.asarray(steps))
    return state


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic of one step


class Partial(NamedTuple):
    """Softmax attention over some of the keys: `out` is not yet divided by `total`."""

    top: Array  # [..., M] largest visible score, -inf if none
    total: Array  # [..., M] sum of exp(score - top)
    out: Array  # [..., M, H] sum of exp(score - top) * v


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    top = jnp.maximum(a.top, b.top)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weight_a, weight_b = jnp.exp(a.top - base), jnp.exp(b.top - base)
    return Partial(
        top=top,
        total=a.total * weight_a + b.total * weight_b,
        out=a.out * weight_a[..., None] + b.out * weight_b[..., None],
    )


def finish(part: Partial) -> tuple[Array, Array]:
    """Normalised output and log-sum-exp; rows that saw nothing give 0 and -inf."""
    empty = part.total == 0.0
    total = jnp.where(empty, 1.0, part.total)
    return part.out / total[..., None], jnp.where(empty, -jnp.inf, jnp.log(total) + part.top)


def _scores(q: Array, k: Array, seen: Array | None, scale: float) -> Array:
    """[..., M, H] x [..., S, H] -> float32 [..., M, S], -inf where unseen; seen is [..., M / G, S] without heads."""
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("PBKMH,PBKSH->PBKMS", q, k, preferred_element_type=precise) * scale
    if seen is None:
        return scores
    group = scores.shape[3] // seen.shape[2]
    return jnp.where(jnp.tile(seen, (1, 1, group, 1))[:, :, None], scores, -jnp.inf)


def partial_attention(q: Array, k: Array, v: Array, seen: Array | None, scale: float) -> Partial:
    """Attention of q [P, B, K, M, H] to k, v [P, B, K, S, H | Hv] where `seen` [P, 1 | B, M / G, S]; None sees all."""
    return _partial_of(_scores(q, k, seen, scale), v, guarded=seen is not None)


def _partial_of(scores: Array, v: Array, *, guarded: bool) -> Partial:
    """Attention with given scores; `guarded` where rows may have none above -inf."""
    top = scores.max(axis=-1)
    base = jnp.where(top == -jnp.inf, 0.0, top) if guarded else top
    weights = jnp.exp(scores - base[..., None])
    out = jnp.einsum("PBKMS,PBKSV->PBKMV", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
    return Partial(top, weights.sum(axis=-1), out)


# ---------------------------------------------------------------------------------------------------------------
# Skipped tiles. One step holds nr x nw skip tiles of each head; their flags are [pairs, B, K, G, nr, nw], where
# the pair (i, j) of tiles has index i * k_tiles + j.


def _margins(scores: Array, before: Array, tile: SkipTile, group: int) -> Array:
    """Margins [P, B, K, G, nr, nw] of scores [P, B, K, M, S]; `before` [P, B, K, M]: each row's largest so far."""
    head = (*scores.shape[:3], group, scores.shape[3] // (group * tile.rows), tile.rows)
    top = scores.reshape(*head, scores.shape[4] // tile.width, tile.width).max(axis=-1)
    highest = jax.lax.cummax(jnp.concatenate([before.reshape(*head, 1), top], axis=-1), axis=top.ndim - 1)
    return rule.row_margin(top, highest[..., :-1]).max(axis=-2)


def _drop_skipped(scores: Array, keep: Array, tile: SkipTile) -> Array:
    """-inf in place of the scores [P, B, K, M, S] of tiles that `keep` [P, B, K, G, nr, nw] does not keep."""
    *head, num_rows, num_columns = keep.shape
    flags = jnp.broadcast_to(keep[..., None, :, None], (*head, num_rows, tile.rows, num_columns, tile.width))
    return jnp.where(flags.reshape(scores.shape), scores, -jnp.inf)


def _start_flags(shape: _Shape, tile: SkipTile, fill: Any) -> Array:
    head = (shape.q_tiles * shape.k_tiles, shape.batch, shape.num_kv_heads, shape.group)
    return jnp.full((*head, shape.tile_q // tile.rows, shape.tile_k // tile.width), fill)


def _join_flags(x: Array, shape: _Shape, tile: SkipTile) -> Array:
    """[pairs, B, K, G, nr, nw] -> [B, N, query tiles, key tiles] of the skip tiles."""
    num_rows, num_columns = x.shape[4:]
    heads = shape.num_kv_heads * shape.group
    x = x.reshape(shape.q_tiles, shape.k_tiles, shape.batch, heads, num_rows, num_columns)
    x = jnp.transpose(x, (2, 3, 0, 4, 1, 5))
    x = x.reshape(shape.batch, heads, shape.q_tiles * num_rows, shape.k_tiles * num_columns)
    return x[:, :, : -(-shape.num_queries // tile.rows), : -(-shape.num_keys // tile.width)]


def _cut_flags(x: Array, shape: _Shape, tile: SkipTile) -> Array:
    """[B, N, query tiles, key tiles] -> [pairs, B, K, G, nr, nw], False beyond the last tiles."""
    num_rows, num_columns = shape.tile_q // tile.rows, shape.tile_k // tile.width
    x = _pad(_pad(x, 2, shape.q_tiles * num_rows), 3, shape.k_tiles * num_columns)
    head = (shape.batch, shape.num_kv_heads, shape.group)
    x = x.reshape(*head, shape.q_tiles, num_rows, shape.k_tiles, num_columns)
    x = jnp.transpose(x, (3, 5, 0, 1, 2, 4, 6))
    return x.reshape(shape.q_tiles * shape.k_tiles, *head, num_rows, num_columns)


def skip_margins(q: Array, k: Array, *, mask: Mask, limits: Limits, scale: float, tile: SkipTile) -> Array:
    """Margins float32 [B, N, query tiles, key tiles] of `skip.margins`, in memory linear in T and S but for themselves.

    One pass tells what every threshold would skip in `flash_attention(q, k, ...)`. Not differentiable.
    """
    q, k = jax.lax.stop_gradient((q, k))
    tiling = _tiling(q.shape, k.shape[1], tile, None)
    shape = _shape(q, k, tiling)
    sight = _Sight(mask, limits, shape)
    q_tiles, k_tiles = _cut_queries(q, shape), _cut_keys(k, shape)
    top = jnp.full(q_tiles.shape[:-1], -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))

    def visit(state, q_tile, k_tile, seen):
        top, margins = state
        scores = _scores(_pick(q_tiles, q_tile), _pick(k_tiles, k_tile), seen & sight.real_queries(q_tile), scale)
        before = _pick(top, q_tile)
        new = _margins(scores, before, tile, shape.group).astype(jnp.float32)
        top = _put(top, q_tile, jnp.maximum(before, scores.max(axis=-1)))
        return top, _put(margins, q_tile * shape.k_tiles + k_tile, new)

    start = top, _start_flags(shape, tile, jnp.float32(-jnp.inf))
    return _join_flags(_walk(visit, start, shape, sight, tiling.lanes, ordered=True)[1], shape, tile)


def visited_tiles(mask: Mask, limits: Limits, batch: int, num_queries: int, num_keys: int, tile: SkipTile) -> Array:
    """Number of tile pairs with a visible (query, key) pair, int32 [B]."""
    if all(limit is None for limit in limits):
        live = mask.schedule(num_queries, num_keys, tile.rows, tile.width).num_live
        return jnp.full((batch,), live, jnp.int32)
    tiling = _tiling((batch, num_queries, 1, 1), num_keys, tile, None)
    shape = _Shape(batch, num_queries, num_keys, 1, 1, 1, tiling.tile_q, tiling.tile_k)
    sight = _Sight(mask, limits, shape)

    def visit(count, q_tile, k_tile, seen):
        seen = seen & sight.real_queries(q_tile)
        tiles = (*seen.shape[:2], shape.tile_q // tile.rows, tile.rows, shape.tile_k // tile.width, tile.width)
        live = seen.reshape(tiles).any(axis=(3, 5)).sum(axis=(2, 3), dtype=jnp.int32)
        return count + live.sum(axis=0)

    return _walk(visit, jnp.zeros((batch,), jnp.int32), shape, sight, tiling.lanes, ordered=True)


# ---------------------------------------------------------------------------------------------------------------
# The two directions


def _forward(
    static: _Static, q: Array, k: Array, v: Array, limits: Limits, log_threshold: Array | None
) -> tuple[Array, Array, Array | None]:
    mask, scale, tiling, tile = static
    shape = _shape(q, k, tiling)
    sight = _Sight(mask, limits, shape)
    q_tiles = _cut_queries(q, shape)
    k_tiles, v_tiles = _cut_keys(k, shape), _cut_keys(sight.clean_keys(v), shape)
    rows = jnp.zeros_like(q_tiles[..., 0], jnp.promote_types(q.dtype, jnp.float32))
    out = jnp.zeros_like(q_tiles, rows.dtype, shape=(*rows.shape, v.shape[3]))
    start = Partial(top=jnp.full_like(rows, -jnp.inf), total=rows, out=out)

    def visit(state, q_tile, k_tile, seen):
        before, kept = state
        if tile is not None:
            seen = seen & sight.real_queries(q_tile)
        scores = _scores(_pick(q_tiles, q_tile), _pick(k_tiles, k_tile), seen, scale)
        if tile is not None and log_threshold is not None:
            margins = _margins(scores, _pick(before.top, q_tile), tile, shape.group)
            keep = rule.keeps(margins, log_threshold[:, None, None, None, None])
            scores = _drop_skipped(scores, keep, tile)
            kept = _put(kept, q_tile * shape.k_tiles + k_tile, keep)
        part = _partial_of(scores, _pick(v_tiles, k_tile), guarded=seen is not None)
        if shape.q_tiles == shape.k_tiles == 1:
            return part, kept
        merged = merge(Partial(*(_pick(x, q_tile) for x in before)), part)
        return Partial(*(_put(x, q_tile, new) for x, new in zip(before, merged, strict=True))), kept

    flags = None if tile is None else _start_flags(shape, tile, False)
    part, flags = _walk(visit, (start, flags), shape, sight, tiling.lanes, ordered=tile is not None)
    out, lse = finish(part)
    out = _join_queries(out.astype(q.dtype), shape)
    keep = None if flags is None or tile is None else _join_flags(flags, shape, tile)
    return out, jnp.swapaxes(_join_queries(lse, shape), 1, 2), keep


def _backward(
    static: _Static,
    q: Array,
    k: Array,
    v: Array,
    limits: Limits,
    out: Array,
    lse: Array,
    keep: Array | None,
    d_out: Array,
    d_lse: Array,
) -> tuple[Array, Array, Array]:
    mask, scale, tiling, tile = static
    shape = _shape(q, k, tiling)
    sight = _Sight(mask, limits, shape)
    lse = jnp.swapaxes(lse, 1, 2)  # [B, T, N]
    empty = lse == -jnp.inf
    precise = lse.dtype
    # Queries that saw nothing take no part: zeroed by selection, whatever q and the cotangent hold there.
    q, d_out, out = (jnp.where(empty[..., None], 0, x) for x in (q, d_out, out))
    d_lse = jnp.where(empty, 0.0, jnp.swapaxes(d_lse, 1, 2))
    # d score = p * (dp - delta): softmax's own correction, and the part that goes through the log-sum-exp.
    delta = (d_out.astype(precise) * out.astype(precise)).sum(axis=-1) - d_lse
    lse = jnp.where(empty, jnp.inf, lse)  # exp(score - inf) = 0
    q_tiles, d_out_tiles = _cut_queries(q, shape), _cut_queries(d_out, shape)
    lse_tiles, delta_tiles = _cut_queries(lse, shape), _cut_queries(delta, shape)
    k_tiles, v_tiles = (_cut_keys(sight.clean_keys(x), shape) for x in (k, v))
    flags = None if keep is None or tile is None else _cut_flags(keep, shape, tile)
    start = (
        jnp.zeros_like(q_tiles, precise),
        jnp.zeros_like(k_tiles, precise),
        jnp.zeros_like(v_tiles, precise),
    )

    def visit(state, q_tile, k_tile, seen):
        q_here, d_out_here = _pick(q_tiles, q_tile), _pick(d_out_tiles, q_tile)
        k_here, v_here = _pick(k_tiles, k_tile), _pick(v_tiles, k_tile)
        scores = _scores(q_here, k_here, seen, scale)
        if flags is not None and tile is not None:
            scores = _drop_skipped(scores, _pick(flags, q_tile * shape.k_tiles + k_tile), tile)
        p = jnp.exp(scores - _pick(lse_tiles, q_tile)[..., None])
        dp = jnp.einsum("PBKMV,PBKSV->PBKMS", d_out_here, v_here, preferred_element_type=precise)
        ds = (p * (dp - _pick(delta_tiles, q_tile)[..., None]) * scale).astype(q.dtype)
        dq = jnp.einsum("PBKMS,PBKSH->PBKMH", ds, k_here, preferred_element_type=precise)
        dk = jnp.einsum("PBKMS,PBKMH->PBKSH", ds, q_here, preferred_element_type=precise)
        dv = jnp.einsum("PBKMS,PBKMV->PBKSV", p.astype(q.dtype), d_out_here, preferred_element_type=precise)
        if shape.q_tiles == shape.k_tiles == 1:
            return dq, dk, dv
        tiles = (q_tile, k_tile, k_tile)
        return tuple(
            _put(x, tile, _pick(x, tile) + new) for x, tile, new in zip(state, tiles, (dq, dk, dv), strict=True)
        )

    dq, dk, dv = _walk(visit, start, shape, sight, tiling.lanes)
    dk, dv = (sight.clean_keys(_join_keys(x, shape)).astype(k.dtype) for x in (dk, dv))
    return _join_queries(dq, shape).astype(q.dtype), dk, dv

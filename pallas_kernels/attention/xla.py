"""Portable flash attention: plain XLA operations over the live tiles of the mask, both directions.

Layout: queries are cut into tiles `[nq, B, K, M, H]` whose M = G * tile_q rows hold all query heads of one key head,
so that grouped heads share K and V without a copy; keys and values into tiles `[nk, B, K, tile_k, H]`. A static list
of (query tile, key tile) pairs is walked by `lax.scan`, `lanes` pairs at a time; the pairs of a step differ in both
query and key tile, so their results go to different accumulators. Pairs that need no masking come first and skip the
predicate. Nothing larger than `B * N * lanes * tile_q * tile_k` is ever held besides linear-size arrays.

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

from pallas_kernels.attention.limits import Limits
from pallas_kernels.masks import Mask


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool
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
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, tiling: Tiling | None = None
) -> tuple[Array, Array]:
    """Output and log-sum-exp; see `flash_attention`."""
    if tiling is None:
        tiling = default_tiling(q.shape[0], q.shape[2], q.shape[1], k.shape[1], jax.default_backend())
    most = min(-(-q.shape[1] // tiling.tile_q), -(-k.shape[1] // tiling.tile_k))
    return _attention(q, k, v, limits, mask, scale, dataclasses.replace(tiling, lanes=min(tiling.lanes, most)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    q: Array, k: Array, v: Array, limits: Limits, mask: Mask, scale: float, tiling: Tiling
) -> tuple[Array, Array]:
    return _forward(q, k, v, limits, mask, scale, tiling)


def _attention_fwd(q, k, v, limits, mask, scale, tiling):
    out, lse = _forward(q, k, v, limits, mask, scale, tiling)
    # A rematerialisation policy that keeps "attention" then need not run the forward pass again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, limits, out, lse)


def _attention_bwd(mask, scale, tiling, residuals, cotangents):
    q, k, v, limits, out, lse = residuals
    dq, dk, dv = _first_order(_Static(mask, scale, tiling), q, k, v, limits, out, lse, *cotangents)
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Static(NamedTuple):
    mask: Mask
    scale: float
    tiling: Tiling


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(static: _Static, q, k, v, limits, out, lse, d_out, d_lse):
    return _backward(q, k, v, limits, out, lse, d_out, d_lse, *static)


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
    mask: Mask, shape: _Shape, lanes: int, is_static: bool, has_positions: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tile pairs to visit as int32 [steps, lanes, 2]: those without masking, and those with.

    Idle lanes hold indices beyond the last tile. With positions the mask says nothing about indices, so every pair
    is visited and masked; with other limits the mask's live pairs are visited, all masked.
    """
    if has_positions:
        live = [(i, j) for i in range(shape.q_tiles) for j in range(shape.k_tiles)]
        return _spread([], shape, lanes), _spread(live, shape, lanes)
    schedule = mask.schedule(shape.num_queries, shape.num_keys, shape.tile_q, shape.tile_k)
    live = [(i, int(j)) for i, tiles in enumerate(schedule.q_to_k) for j in tiles]
    masked = [pair for pair in live if schedule.is_partial[pair] or not is_static]
    plain = [pair for pair in live if not schedule.is_partial[pair] and is_static]
    return _spread(plain, shape, lanes), _spread(masked, shape, lanes)


def _spread(pairs: list[tuple[int, int]], shape: _Shape, lanes: int) -> np.ndarray:
    """Groups pairs into steps of `lanes` in which no query tile and no key tile occurs twice."""
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
            free = (j for j in waiting[i] if j not in taken)
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


def _walk(body: Any, state: Any, shape: _Shape, sight: _Sight, lanes: int) -> Any:
    """Folds `body(state, q_tile [P], k_tile [P], seen or None)` over all live pairs."""
    plain, masked = _steps(sight.mask, shape, lanes, sight.is_static, sight.has_positions)
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
    """Attention of q [P, B, K, M, H] to k and v [P, B, K, S, H or Hv] where `seen` [P, 1 | B, M / G, S]; None sees all."""
    scores = _scores(q, k, seen, scale)
    top = scores.max(axis=-1)
    base = top if seen is None else jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(scores - base[..., None])
    out = jnp.einsum("PBKMS,PBKSV->PBKMV", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
    return Partial(top, weights.sum(axis=-1), out)


def _forward(
    q: Array, k: Array, v: Array, limits: Limits, mask: Mask, scale: float, tiling: Tiling
) -> tuple[Array, Array]:
    shape = _shape(q, k, tiling)
    sight = _Sight(mask, limits, shape)
    q_tiles = _cut_queries(q, shape)
    k_tiles, v_tiles = _cut_keys(k, shape), _cut_keys(sight.clean_keys(v), shape)
    rows = jnp.zeros_like(q_tiles[..., 0], jnp.promote_types(q.dtype, jnp.float32))
    out = jnp.zeros_like(q_tiles, rows.dtype, shape=(*rows.shape, v.shape[3]))
    start = Partial(top=jnp.full_like(rows, -jnp.inf), total=rows, out=out)

    def visit(state, q_tile, k_tile, seen):
        k_here, v_here = _pick(k_tiles, k_tile), _pick(v_tiles, k_tile)
        part = partial_attention(_pick(q_tiles, q_tile), k_here, v_here, seen, scale)
        if shape.q_tiles == shape.k_tiles == 1:
            return part
        merged = merge(Partial(*(_pick(x, q_tile) for x in state)), part)
        return Partial(*(_put(x, q_tile, new) for x, new in zip(state, merged, strict=True)))

    out, lse = finish(_walk(visit, start, shape, sight, tiling.lanes))
    out = _join_queries(out.astype(q.dtype), shape)
    return out, jnp.swapaxes(_join_queries(lse, shape), 1, 2)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    limits: Limits,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
    mask: Mask,
    scale: float,
    tiling: Tiling,
) -> tuple[Array, Array, Array]:
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
    start = (
        jnp.zeros_like(q_tiles, precise),
        jnp.zeros_like(k_tiles, precise),
        jnp.zeros_like(v_tiles, precise),
    )

    def visit(state, q_tile, k_tile, seen):
        q_here, d_out_here = _pick(q_tiles, q_tile), _pick(d_out_tiles, q_tile)
        k_here, v_here = _pick(k_tiles, k_tile), _pick(v_tiles, k_tile)
        scores = _scores(q_here, k_here, seen, scale)
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

"""Attention of queries to the whole blocks that they chose, added to attention to their own blocks; both directions.

The queries that chose a block are gathered into tiles of rows, which share its keys and values; all query heads of a
key head are rows of the same lists. Every (query, rank) pair gets a partial result of its own, written once, and a
query adds them up in the order of their ranks, those of its own block first. The backward pass walks the same tiles: dK
and dV add up block by block, dQ through partial rows. Nothing is added atomically, so every run gives the same bits.
One key head of one row of the batch is worked on at a time; nothing of size T x S or T x blocks is ever held.

Numerics: scores, softmax and all sums in float32; partial results, probabilities and `ds` are rounded to the input
dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.moba import lists
from pallas_kernels.moba.heads import View, join_groups, map_heads, split_groups
from pallas_kernels.moba.layout import Layout
from pallas_kernels.moba.lists import BlockLists, Tiles


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How lists are cut: rows of a tile, and tiles worked on at once. Changes speed and memory only."""

    rows: int
    lanes: int


def default_tiling(num_pairs: int, num_blocks: int, block_size: int, platform: str) -> Tiling:
    """Tiles no longer than an average list, and as many at once as their scores stay small. Not tuned."""
    average = -(-num_pairs // num_blocks)
    rows = max(16, min(128, average + -average % 16))
    budget, most = (2**18, 16) if platform == "cpu" else (2**24, 64)
    lanes = min(most, budget // (rows * block_size), lists.most_tiles(num_pairs, num_blocks, rows))
    return Tiling(rows, max(1, lanes))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    layout: Layout,
    indices: Int[Array, "B T N ranks"],
    *,
    block_size: int,
    scale: float,
    own: "Own | None" = None,
    own_operands: tuple[Array, ...] = (),
    tiling: Tiling | None = None,
    forward: "OfHead | None" = None,
    backward: "OfHead | None" = None,
    aligned: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Output and log-sum-exp over all keys of the candidates `indices`, counted from each query's first; -1 is none.

    `own(q, k, v, *own_operands)` attends to other keys than those, of queries' own blocks, and returns output and
    log-sum-exp [B, N, T]; these are part of the softmax. The sums begin with its results and gradients, in the memory
    that holds them.

    `ranks` is at least 1, and so is the number of candidates of the layout. `forward` and
    `backward` do the work of one head, `forward_head` and `backward_head` unless others are given. `aligned` promises
    that the candidates lie end to end from the first key on, which saves copies.
    """
    if tiling is None:
        num_pairs = math.prod(indices.shape[1:]) // k.shape[2]
        tiling = default_tiling(num_pairs, layout.block_start.shape[1], block_size, jax.default_backend())
    static = Static(
        block_size, scale, tiling, own or _nothing, forward or forward_head, backward or backward_head, aligned
    )
    return _routed(static, q, k, v, layout, indices, own_operands)


Own = Callable[..., tuple[Array, Array]]
OfHead = Callable[..., tuple[Array, ...]]


class Static(NamedTuple):
    block_size: int
    scale: float
    tiling: Tiling
    own: Own
    forward: OfHead
    backward: OfHead
    aligned: bool


class Head(NamedTuple):
    """One key head of one row of the batch. R = T * G rows, the query heads of the group innermost."""

    q: Float[Array, "R H"]
    k: Float[Array, "S H"]
    v: Float[Array, "S Hv"]
    blocks: Int[Array, "R ranks"]  # chosen candidates of the layout, -1 for none

    @classmethod
    def of(cls, q: View, k: View, v: View, blocks: View) -> "Head":
        return cls(_rows(q.pick()), k.pick(), v.pick(), _rows(blocks.pick()))


def _arrays(q: Array, k: Array, v: Array, layout: Layout, indices: Array) -> dict[str, Array]:
    """Those of all heads, [B, L, K, ...]."""
    blocks = jnp.where(indices < 0, -1, indices + layout.first[:, :, None, None])
    return {"q": split_groups(q, k), "k": k, "v": v, "blocks": split_groups(blocks, k)}


def _rows(x: Array) -> Array:
    """[T, G, ...] -> [T * G, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _nothing(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Attention to no key."""
    batch, num_queries, num_heads, _ = q.shape
    lse = jnp.full((batch, num_heads, num_queries), -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
    return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(static: Static, q: Array, k: Array, v: Array, layout: Layout, indices: Array, own_operands):
    """Output [B, T, N, Hv] and log-sum-exp [B, N, T] over own and chosen blocks."""
    return _add_routed(static, q, k, v, layout, indices, *static.own(q, k, v, *own_operands))


def _add_routed(static: Static, q, k, v, layout, indices, own_out, own_lse) -> tuple[Array, Array]:
    results = {"out": split_groups(own_out, k), "lse": split_groups(jnp.swapaxes(own_lse, 1, 2), k)}
    out, lse = map_heads(functools.partial(static.forward, static), layout, _arrays(q, k, v, layout, indices), results)
    return join_groups(out), jnp.swapaxes(join_groups(lse), 1, 2)


def _routed_fwd(static, q, k, v, layout, indices, own_operands):
    own, pull_own = jax.vjp(lambda q, k, v: static.own(q, k, v, *own_operands), q, k, v)
    # A rematerialisation policy that keeps "attention" then need not run the forward pass again.
    name = functools.partial(jax.tree.map, lambda x: checkpoint_name(x, "attention"))
    own = name(own)
    out, lse = name(_add_routed(static, q, k, v, layout, indices, *own))
    return (out, lse), (q, k, v, layout, indices, own, pull_own, out, lse)


def _routed_bwd(static, residuals, cotangents):
    q, k, v, layout, indices, own, pull_own, out, lse = residuals
    d_out, d_lse = cotangents
    own_out, own_lse = own
    of_own = pull_own(_own_cotangents(own_out, own_lse, out, lse, d_out, d_lse))
    return *_first_order(static, q, k, v, layout, indices, out, lse, d_out, d_lse, *of_own), None, None, None


_routed.defvjp(_routed_fwd, _routed_bwd)


def _own_cotangents(own_out, own_lse, out, lse, d_out, d_lse) -> tuple[Array, Array]:
    """Of the results for own blocks, whose share of the softmax is exp(own_lse - lse)."""
    share = jnp.where(own_lse == -jnp.inf, 0.0, jnp.exp(own_lse - lse))
    of_queries = jnp.swapaxes(share, 1, 2)[..., None]
    gain = (d_out.astype(lse.dtype) * (own_out.astype(lse.dtype) - out.astype(lse.dtype))).sum(axis=-1)
    d_own_lse = share * (jnp.swapaxes(gain, 1, 2) + d_lse)
    d_own_out = (of_queries * d_out).astype(own_out.dtype)
    # By selection: what sees nothing may have any cotangent.
    return jnp.where(of_queries == 0.0, 0, d_own_out), jnp.where(share == 0.0, 0.0, d_own_lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(static: Static, q, k, v, layout, indices, out, lse, d_out, d_lse, *of_own):
    """Gradients, to which those of own blocks `of_own` are added."""
    lse, d_lse = (jnp.swapaxes(x, 1, 2) for x in (lse, d_lse))
    empty = lse == -jnp.inf
    # d score = p * (dp - delta): softmax's own correction, and the part that goes through the log-sum-exp.
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(axis=-1) - d_lse
    of_rows = {"d_out": d_out, "lse": jnp.where(empty, jnp.inf, lse), "delta": jnp.where(empty, 0.0, delta)}
    arrays = _arrays(q, k, v, layout, indices) | {name: split_groups(x, k) for name, x in of_rows.items()}
    dq, dk, dv = of_own
    results = {"dq": split_groups(dq, k), "dk": dk, "dv": dv}
    dq, dk, dv = map_heads(functools.partial(static.backward, static), layout, arrays, results)
    return join_groups(dq), dk, dv


@_first_order.defjvp
def _second_order(static, primals, tangents):
    raise NotImplementedError(
        'moba_attention "xla" has no second derivative: differentiate implementation="reference" instead'
    )


class Step(NamedTuple):
    """What the `lanes` tiles of one step read."""

    row: Int[Array, "lanes rows"]
    k: Float[Array, "lanes keys H"]
    v: Float[Array, "lanes keys Hv"]
    seen: Bool[Array, "lanes rows keys"]
    block: Int[Array, "lanes"]


class _Walk:
    """The tiles of one head, a step at a time."""

    def __init__(self, static: Static, start: Array, length: Array, head: Head):
        self.block_size, self.scale, tiling = static[:3]
        self.rows, self.lanes = tiling.rows, tiling.lanes
        self.start, self.length, self.head = start, length, head
        num_blocks, num_pairs = start.shape[0], head.blocks.size
        num_tiles = lists.most_tiles(num_pairs, num_blocks, self.rows)
        self.num_tiles = num_tiles + -num_tiles % self.lanes
        self.lists: BlockLists = lists.invert_selection(head.blocks, num_blocks)
        self.tiles: Tiles = lists.cut(self.lists, self.rows, self.num_tiles)

    @property
    def num_steps(self) -> Array:
        return -(-self.tiles.total // self.lanes)

    def step(self, index: Array) -> Step:
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, index * self.lanes, self.lanes)

        block = take(self.tiles.block)
        entry = take(self.tiles.start)[:, None] + jnp.arange(self.rows, dtype=jnp.int32)
        is_row = jnp.arange(self.rows) < take(self.tiles.size)[:, None]
        is_key = jnp.arange(self.block_size) < self.length[block][:, None]
        ranks = self.head.blocks.shape[1]
        keys = self.start[block][:, None] + jnp.arange(self.block_size, dtype=jnp.int32)
        return Step(
            row=self.lists.entries.at[entry].get(mode="clip") // ranks,
            k=self.head.k.at[keys].get(mode="clip"),
            v=self.head.v.at[keys].get(mode="clip"),
            seen=is_row[:, :, None] & is_key[:, None],
            block=block,
        )

    def scores(self, q: Array, step: Step) -> Array:
        precise = jnp.promote_types(q.dtype, jnp.float32)
        scores = jnp.einsum("LRH,LSH->LRS", q, step.k, preferred_element_type=precise) * self.scale
        return jnp.where(step.seen, scores, -jnp.inf)

    def put(self, rows: Array, index: Array, new: Array) -> Array:
        """Writes the results [lanes, rows, ...] of a step among those of all tiles."""
        new = new.reshape(-1, *new.shape[2:]).astype(rows.dtype)
        return jax.lax.dynamic_update_slice_in_dim(rows, new, index * self.lanes * self.rows, 0)

    def per_pair(self, rank: Array | int) -> tuple[Array, Array]:
        """Which rows have a block of this rank, and where its results are."""
        place = self.tiles.place.reshape(self.head.blocks.shape)
        return self.head.blocks[:, rank] >= 0, place[:, rank]


def forward_head(
    static: Static, start: Array, length: Array, *, out: View, lse: View, **arrays: View
) -> tuple[Array, Array]:
    """Output [T, G, Hv] and log-sum-exp [T, G], over what `out` and `lse` are of and the routed blocks."""
    head = Head.of(**arrays)
    walk = _Walk(static, start, length, head)
    precise = jnp.promote_types(head.q.dtype, jnp.float32)

    def visit(index, state):
        step = walk.step(index)
        scores = walk.scores(head.q[step.row], step)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
        total = weights.sum(axis=-1)
        some = jnp.where(total == 0.0, 1.0, total)
        part = jnp.einsum("LRS,LSV->LRV", weights.astype(step.v.dtype), step.v, preferred_element_type=precise)
        part_lse = jnp.where(total == 0.0, -jnp.inf, jnp.log(some) + top[..., 0])
        return walk.put(state[0], index, part / some[..., None]), walk.put(state[1], index, part_lse)

    num_places = walk.num_tiles * walk.rows
    empty = jnp.zeros((num_places, head.v.shape[1]), head.q.dtype), jnp.full((num_places,), -jnp.inf, precise)
    parts, lses = jax.lax.fori_loop(0, walk.num_steps, visit, empty)

    return combine(head.blocks, walk.tiles.place, parts, lses, out.pick(), lse.pick())


def combine(
    blocks: Int[Array, "R ranks"],
    place: Int[Array, "pairs"] | None,
    parts: Float[Array, "slots Hv"],
    lses: Float[Array, "slots"],
    own_out: Float[Array, "T G Hv"],
    own_lse: Float[Array, "T G"],
    *,
    unroll: bool = False,
) -> tuple[Float[Array, "T G Hv"], Float[Array, "T G"]]:
    """Adds the partial results of each row, in the order of its ranks, to those of its own block.

    `place` says where those of a pair are; None: in the order row * ranks + rank. What stands in a slot of no pair is
    never read. `unroll` makes one operation of the sum.
    """
    ranks = blocks.shape[1]
    if place is None:
        lses, of_pairs = lses.reshape(blocks.shape), parts.reshape(*blocks.shape, -1)

        def part(rank):
            return of_pairs[:, rank]
    else:
        at = place.reshape(blocks.shape)
        lses = lses[at]

        def part(rank):
            return parts[at[:, rank]]

    has_block, precise = blocks >= 0, lses.dtype
    of_own = _rows(own_lse)
    lse_of = jnp.where(has_block, lses, -jnp.inf)
    top = jnp.maximum(lse_of.max(axis=1), of_own)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    of_own, weights = jnp.exp(of_own - top), jnp.exp(lse_of - top[:, None])
    total = of_own + weights.sum(axis=1)
    some = jnp.where(total == 0.0, 1.0, total)
    shares = weights / some[:, None]

    def add(rank, out):
        return out + jnp.where(has_block[:, rank][:, None], shares[:, rank][:, None] * part(rank), 0)

    out = (of_own / some)[:, None] * _rows(own_out).astype(precise)
    out = jax.lax.fori_loop(0, ranks, add, out, unroll=unroll or None)
    lse = jnp.where(total == 0.0, -jnp.inf, jnp.log(some) + top)
    return out.astype(own_out.dtype).reshape(own_out.shape), lse.reshape(own_lse.shape)


def backward_head(
    static: Static,
    start: Array,
    length: Array,
    *,
    d_out: View,
    lse: View,
    delta: View,
    dq: View,
    dk: View,
    dv: View,
    **arrays: View,
) -> tuple[Array, Array, Array]:
    """`dq` [T, G, H], `dk` [S, H], `dv` [S, Hv] and the gradients of the routed blocks; `lse` inf is a weight of 0."""
    head = Head.of(**arrays)
    of_rows, of_lse, of_delta = (_rows(x.pick()) for x in (d_out, lse, delta))
    # Rows without a routed block fill tiles up: zeroed by selection, whatever q and the cotangent hold there.
    takes_part = (head.blocks >= 0).any(axis=1, keepdims=True)
    q, of_rows = (jnp.where(takes_part, x, 0) for x in (head.q, of_rows))
    walk = _Walk(static, start, length, head)
    precise = of_lse.dtype

    def visit(index, state):
        dq_parts, dk_sums, dv_sums = state
        step = walk.step(index)
        q_here, d_out_here = q[step.row], of_rows[step.row]
        p = jnp.exp(walk.scores(q_here, step) - of_lse[step.row][..., None])
        dp = jnp.einsum("LRV,LSV->LRS", d_out_here, step.v, preferred_element_type=precise)
        ds = jnp.where(step.seen, p * (dp - of_delta[step.row][..., None]) * walk.scale, 0).astype(head.q.dtype)
        p = p.astype(head.q.dtype)
        dk_here = jnp.einsum("LRS,LRH->LSH", ds, q_here, preferred_element_type=precise)
        dv_here = jnp.einsum("LRS,LRV->LSV", p, d_out_here, preferred_element_type=precise)
        dq_here = jnp.einsum("LRS,LSH->LRH", ds, step.k, preferred_element_type=precise)
        dq_parts = walk.put(dq_parts, index, dq_here)
        return dq_parts, _add_blocks(dk_sums, step.block, dk_here), _add_blocks(dv_sums, step.block, dv_here)

    num_sums = start.shape[0] + walk.lanes
    dq_parts, dk_sums, dv_sums = jax.lax.fori_loop(
        0,
        walk.num_steps,
        visit,
        (
            jnp.zeros((walk.num_tiles * walk.rows, head.q.shape[1]), head.q.dtype),
            jnp.zeros((num_sums, walk.block_size, head.k.shape[1]), precise),
            jnp.zeros((num_sums, walk.block_size, head.v.shape[1]), precise),
        ),
    )

    def add(rank, total):
        has_block, place = walk.per_pair(rank)
        return total + jnp.where(has_block[:, None], dq_parts[place].astype(precise), 0)

    own_dq = dq.pick()
    dq_rows = jax.lax.fori_loop(0, head.blocks.shape[1], add, _rows(own_dq).astype(precise))
    of_keys = (
        add_to_keys(x.pick(), sums[: start.shape[0]], start, length, aligned=static.aligned)
        for x, sums in ((dk, dk_sums), (dv, dv_sums))
    )
    return dq_rows.astype(own_dq.dtype).reshape(own_dq.shape), *of_keys


def add_to_keys(
    x: Float[Array, "S H"], sums: Float[Array, "C keys H"], start: Array, length: Array, *, aligned: bool
) -> Float[Array, "S H"]:
    """`x`, rows of all keys, and the sums of the candidates; every key lies in at most one."""
    num_keys = x.shape[0]
    if aligned:
        rows = sums.reshape(-1, sums.shape[2])[:num_keys]
        rows = jnp.pad(rows, ((0, num_keys - rows.shape[0]), (0, 0)))
    else:
        offset = jnp.arange(sums.shape[1])
        keys = jnp.where(offset < length[:, None], start[:, None] + offset, num_keys)  # beyond the end: dropped
        # Numbers are scattered and rows gathered, since a GPU gathers rows several times faster than it scatters them.
        source = jnp.full((num_keys,), keys.size).at[keys.reshape(-1)].set(jnp.arange(keys.size), mode="drop")
        rows = sums.reshape(keys.size, -1).at[source].get(mode="fill", fill_value=0)
    precise = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(precise) + rows.astype(precise)).astype(x.dtype)


def _add_blocks(sums: Array, block: Array, new: Array) -> Array:
    """Adds new [lanes, ...] to sums [blocks, ...]; `block` [lanes] grows by 0 or 1 from lane to lane.

    A product with zeros and ones instead of a scatter: the same sum in every run.
    """
    lanes = block.shape[0]
    is_of = block - block[0] == jnp.arange(lanes)[:, None]  # [window, lanes]
    if lanes > 1:
        new = jnp.einsum("WL,LSH->WSH", is_of.astype(new.dtype), new, precision="highest")
    old = jax.lax.dynamic_slice_in_dim(sums, block[0], lanes)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + new, block[0], 0)

"""Hopper kernels of block-routed attention: `select.py` routes, `attend.py` attends to the routed blocks, `backward.py`
has their gradients.

What is between them stays in XLA: the lists of queries per block, and the sum of a query's partial results. The kernels
read queries, keys and values of a head where they lie in the arrays of all heads, and write the results of each pair of
a query and a rank to a place of its own. The own blocks are left to `flash_attention`.

A block of more than 128 keys is attended as several of 128, which the same queries chose.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch
from pallas_kernels.attention.mosaic_sm90.parts import LOG2E
from pallas_kernels.moba import lists, routed, xla
from pallas_kernels.moba.centroids import centroids_of_all
from pallas_kernels.moba.heads import View
from pallas_kernels.moba.layout import Layout
from pallas_kernels.moba.mosaic_sm90 import attend, backward, select
from pallas_kernels.moba.routed import Static

MAX_RANKS = 15
MAX_BLOCK = 128
LONGEST_PIECE = 16  # tiles of a list that one CTA adds up


def unsupported(
    q: Any, k: Any, v: Any, *, block_size: int, top_k: int, causal: bool, interpret: Any = None
) -> str | None:
    """Why the kernels cannot run this call, in words; None when they can."""
    if v.shape[3] != q.shape[3]:
        return f"needs values of the head dim of keys; got {v.shape[3]} and {q.shape[3]}"
    if block_size != 64 and block_size % MAX_BLOCK:
        return f"needs block_size 64 or a multiple of {MAX_BLOCK}; got {block_size}"
    if k.shape[1] < min(block_size, MAX_BLOCK):
        return f"needs at least one block of keys; got {k.shape[1]}"
    return select_unsupported(q, k, top_k=top_k, causal=causal, interpret=interpret)


def select_unsupported(q: Any, k: Any, *, top_k: int, causal: bool, interpret: Any = None) -> str | None:
    """The same for the routing kernel alone."""
    if not causal:
        return "needs causal=True"
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"needs bfloat16 or float16; got {q.dtype}"
    if q.shape[3] not in (64, 128):
        return f"needs a head dim of 64 or 128; got {q.shape[3]}"
    if top_k - 1 > MAX_RANKS:
        return f"needs top_k of at most {MAX_RANKS + 1}; got {top_k}"
    if q.shape[0] == 0 or q.shape[1] == 0:
        return "has nothing to do"
    if (reason := dispatch.undivided()) is not None:
        return reason
    return None if interpret is not None else compat.missing_hopper()


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: tuple[Array, Array] | None,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    scale: float,
    own_implementation: str | None = "mosaic",
    gradients: bool = True,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"], Int[Array, "B T N top_k"]]:
    """Output, log-sum-exp and selection; see `moba_attention`. Without `gradients` these are left to the XLA path.

    Raises:
      NotImplementedError: shapes or dtypes that the kernels do not take.
    """
    options: dict[str, Any] = {"block_size": block_size, "top_k": top_k, "causal": causal}
    if (reason := unsupported(q, k, v, **options, interpret=interpret or object())) is not None:
        raise NotImplementedError(f"moba_attention on Hopper {reason}")
    parts: dict[str, Any] = {"choose": choose, "forward": forward_head}
    if gradients:
        parts["backward"] = backward_head
    if interpret is not None:
        parts = {name: functools.partial(part, interpret=interpret) for name, part in parts.items()}
    return xla.run(q, k, v, segments, **options, scale=scale, own_implementation=own_implementation, **parts)


def choose(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    layout: Layout,
    *,
    block_size: int,
    ranks: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Int[Array, "B T N ranks"]:
    """As `routing.choose_all`."""
    means = centroids_of_all(k, layout.block_start, layout.block_length, block_size)
    return select.run(q, means, layout, ranks=ranks, interpret=interpret)


class _Tiles(NamedTuple):
    """What the kernels read for one head, forward and backward."""

    chosen: Int[Array, "R ranks"]  # block of each pair, -1 for none; R = T * G rows, the heads of the group innermost
    block_size: int
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    where: Int[Array, "2"]  # the row and head of these that are read
    lists: lists.BlockLists
    block: Int[Array, "tiles"]  # -1 beyond the last tile
    pair: Int[Array, "slots"]  # row * ranks + rank, of each slot of the tiles; -1 for none
    row: Int[Array, "slots"]  # the same row, counted in the array of all heads

    @classmethod
    def of(cls, static: Static, start: Array, q: View, k: View, v: View, blocks: View) -> "_Tiles":
        block_size, chosen = static.block_size, blocks.pick()
        if (pieces := -(-block_size // MAX_BLOCK)) > 1:
            # Each block is several, chosen together; the lists then hold each pair once for every piece.
            block_size, piece = MAX_BLOCK, jnp.arange(pieces)
            start = (start[:, None] + piece * MAX_BLOCK).reshape(-1)
            chosen = jnp.where(chosen[..., None] < 0, -1, chosen[..., None] * pieces + piece)
        num_queries, num_heads, group = q.array.shape[1:4]
        chosen = chosen.reshape(num_queries * group, -1)
        num_blocks = start.shape[0]
        of_blocks = lists.invert_selection(chosen, num_blocks)
        num_tiles = lists.most_tiles(chosen.size, num_blocks, attend.TILE)
        tiles = lists.cut(of_blocks, attend.TILE, num_tiles)
        offset = jnp.arange(attend.TILE, dtype=jnp.int32)
        slot = (tiles.start[:, None] + offset).reshape(-1)
        pair = of_blocks.entries.at[slot].get(mode="clip")
        pair = jnp.where((offset < tiles.size[:, None]).reshape(-1), pair, -1)
        query, member = jnp.divmod(pair // chosen.shape[1], group)
        row = ((q.row * num_queries + query) * num_heads + q.head) * group + member
        where = jnp.stack([k.row, k.head])
        keys: tuple[Array, ...] = (k.array, v.array)
        if not static.aligned or compat.whole_atoms(k.array.shape[1]) != k.array.shape[1]:
            # Blocks of packed rows begin anywhere, and a swizzled copy at multiples of 8: a copy of the head is read.
            of_blocks_keys = (start[:, None] + jnp.arange(block_size, dtype=jnp.int32)).reshape(-1)
            keys = tuple(x.pick().at[of_blocks_keys].get(mode="clip")[None, :, None] for x in (k, v))
            where = jnp.zeros_like(where)
        return cls(
            chosen=chosen,
            block_size=block_size,
            k=keys[0],
            v=keys[1],
            where=where,
            lists=of_blocks,
            block=jnp.where(jnp.arange(num_tiles) < tiles.total, tiles.block, -1),
            pair=pair,
            row=jnp.where(pair < 0, -1, row),
        )

    def of_slots(self, x: View, otherwise: float) -> Float[Array, "slots"]:
        """A number of each row in the order of the slots."""
        row = jnp.maximum(self.pair, 0) // self.chosen.shape[1]
        return jnp.where(self.pair < 0, otherwise, x.pick().reshape(-1)[row])


def _matrix(x: View) -> Float[Array, "all_rows H"]:
    """The rows of all heads, as `_Tiles.row` counts them."""
    return x.array.reshape(-1, x.array.shape[-1])


def forward_head(
    static: Static,
    start: Int[Array, "C"],
    length: Int[Array, "C"],
    *,
    q: View,
    out: View,
    lse: View,
    interpret: plgpu.InterpretGPUParams | None = None,
    **arrays: View,
) -> tuple[Float[Array, "T G H"], Float[Array, "T G"]]:
    """As `routed.forward_head`; every candidate in use has `block_size` keys."""
    del length
    here = _Tiles.of(static, start, q, **arrays)
    parts, lses = attend.run(
        _matrix(q),
        here.row,
        here.pair,
        here.k,
        here.v,
        here.where,
        here.block,
        num_pairs=here.chosen.size,
        block_size=here.block_size,
        scale=static.scale,
        interpret=interpret,
    )
    return routed.combine(here.chosen, None, parts, lses, out.pick(), lse.pick(), unroll=True)


def backward_head(
    static: Static,
    start: Int[Array, "C"],
    length: Int[Array, "C"],
    *,
    q: View,
    d_out: View,
    lse: View,
    delta: View,
    dq: View,
    dk: View,
    dv: View,
    interpret: plgpu.InterpretGPUParams | None = None,
    **arrays: View,
) -> tuple[Float[Array, "T G H"], Float[Array, "S H"], Float[Array, "S H"]]:
    """As `routed.backward_head`."""
    here = _Tiles.of(static, start, q, **arrays)
    stats = jnp.stack([here.of_slots(lse, jnp.inf) * LOG2E, here.of_slots(delta, 0.0)])
    of_rows, keys = (_matrix(q), _matrix(d_out), stats, here.row), (here.k, here.v, here.where)
    options: dict[str, Any] = {"block_size": here.block_size, "scale": static.scale, "interpret": interpret}
    dq_parts = backward.query_gradients(
        *of_rows, here.pair, *keys, here.block, num_pairs=here.chosen.size, **options
    ).reshape(*here.chosen.shape, -1)
    pieces = lists.pieces(here.lists, attend.TILE, here.block.shape[0], LONGEST_PIECE)
    parts = backward.key_gradients(*of_rows, *keys, pieces, **options)
    sums = backward.add_pieces(parts, pieces, interpret=interpret)
    own_dq = dq.pick()
    dq_rows = own_dq.reshape(len(here.chosen), -1).astype(jnp.float32)
    for rank in range(here.chosen.shape[1]):  # written out it is one operation
        dq_rows += jnp.where(here.chosen[:, rank][:, None] >= 0, dq_parts[:, rank], 0)
    split = start.shape[0], static.block_size
    new_dk, new_dv = (
        routed.add_to_keys(x.pick(), of_blocks.reshape(*split, -1), start, length, aligned=static.aligned)
        for x, of_blocks in zip((dk, dv), sums, strict=True)
    )
    return dq_rows.astype(own_dq.dtype).reshape(own_dq.shape), new_dk, new_dv


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: both kernels, for every head dim, block size and several numbers of ranks."""
    from pallas_kernels.compile_gate import CompileCase

    array = jax.ShapeDtypeStruct
    queries, dtype = 4096, jnp.bfloat16
    for head_dim in (64, 128):
        for ranks in (1, 7, MAX_RANKS):
            parts: Any = (array((1, size), jnp.int32) for size in (64, 64, queries, queries, queries))
            layout = Layout(*parts)

            def route(q, means, layout, ranks=ranks):
                return select.run(q, means, layout, ranks=ranks)

            yield CompileCase(
                name=f"moba select ranks={ranks} H={head_dim}",
                function=route,
                avals=(array((1, queries, 4, head_dim), dtype), array((1, 512, 2, head_dim), dtype), layout),
            )
        for block_size in (64, 128):
            options = {"block_size": block_size, "scale": 0.1}
            of_pairs = {"num_pairs": 7 * queries}
            tiles = array((64,), jnp.int32)
            of_pieces: Any = [array((32,), jnp.int32)] * 5
            heads, where = array((1, queries, 4, head_dim), dtype), array((2,), jnp.int32)
            rows, keys = array((4 * queries, head_dim), dtype), (heads, heads, where)
            slots = array((tiles.shape[0] * attend.TILE,), jnp.int32)
            gradient = (rows, rows, array((2, *slots.shape), jnp.float32), slots)
            pieces = lists.Pieces(*of_pieces)
            parts = array((32, block_size, head_dim), dtype)
            yield CompileCase(
                name=f"moba add pieces block={block_size} H={head_dim}",
                function=backward.add_pieces,
                avals=((parts, parts), pieces),
                required=(),  # neither the tensor core nor the TMA has a part in it
            )
            for name, function, avals, more in (
                ("attend", attend.run, (rows, slots, slots, *keys, tiles), of_pairs),
                ("dq", backward.query_gradients, (*gradient, slots, *keys, tiles), of_pairs),
                ("dk dv", backward.key_gradients, (*gradient, *keys, pieces), {}),
            ):
                yield CompileCase(
                    name=f"moba {name} block={block_size} H={head_dim}",
                    function=functools.partial(function, **options, **more),
                    avals=avals,
                    # Rows come past the registers, and the tensor core may read them only behind a fence.
                    required=("HGMMA", "UTMALDG", "LDGSTS", "FENCE"),
                )

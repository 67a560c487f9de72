"""Hopper kernels of block-routed attention: `select.py` routes, `attend.py` attends to the routed blocks, `backward.py`
has their gradients.

What is between them stays in XLA: the lists of queries per block, and the sum of a query's partial results. The kernels
read queries where they lie, and write the results of each pair of a query and a rank to a place of its own. The own
blocks are left to `flash_attention`.

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

    head: routed.Head
    block_size: int
    keys: Int[Array, "C_keys"] | None  # of all candidates, one after the other; None: they lie so
    lists: lists.BlockLists
    block: Int[Array, "tiles"]  # -1 beyond the last tile
    pair: Int[Array, "slots"]  # row * ranks + rank, of each slot of the tiles; -1 for none

    @classmethod
    def of(cls, static: Static, start: Array, **arrays: Array) -> "_Tiles":
        block_size = static.block_size
        if (pieces := -(-block_size // MAX_BLOCK)) > 1:
            # Each block is several, chosen together; the lists then hold each pair once for every piece.
            block_size, piece = MAX_BLOCK, jnp.arange(pieces)
            start = (start[:, None] + piece * MAX_BLOCK).reshape(-1)
            blocks = arrays["blocks"]
            split = jnp.where(blocks[..., None] < 0, -1, blocks[..., None] * pieces + piece)
            arrays = arrays | {"blocks": split.reshape(*blocks.shape[:-1], -1)}
        head = routed.Head.of(**arrays)
        num_blocks = start.shape[0]
        of_blocks = lists.invert_selection(head.blocks, num_blocks)
        num_tiles = lists.most_tiles(head.blocks.size, num_blocks, attend.TILE)
        tiles = lists.cut(of_blocks, attend.TILE, num_tiles)
        offset = jnp.arange(attend.TILE, dtype=jnp.int32)
        slot = (tiles.start[:, None] + offset).reshape(-1)
        return cls(
            head=head,
            block_size=block_size,
            # Blocks of packed rows begin anywhere, those of a swizzled copy at multiples of 8.
            keys=None if static.aligned else (start[:, None] + jnp.arange(block_size, dtype=jnp.int32)).reshape(-1),
            lists=of_blocks,
            block=jnp.where(jnp.arange(num_tiles) < tiles.total, tiles.block, -1),
            pair=jnp.where((offset < tiles.size[:, None]).reshape(-1), of_blocks.entries.at[slot].get(mode="clip"), -1),
        )

    @property
    def ranks(self) -> int:
        return self.head.blocks.shape[1]

    def of_slots(self, x: Float[Array, "R"], otherwise: float) -> Float[Array, "slots"]:
        """A number of each row in the order of the slots."""
        return jnp.where(self.pair < 0, jnp.asarray(otherwise, x.dtype), x[jnp.maximum(self.pair, 0) // self.ranks])

    def of_keys(self, x: Array) -> Array:
        if self.keys is None:
            return x[: (self.lists.offsets.shape[0] - 1) * self.block_size]
        return x.at[self.keys].get(mode="clip")


def forward_head(
    static: Static,
    start: Int[Array, "C"],
    length: Int[Array, "C"],
    *,
    out: Float[Array, "T G H"],
    lse: Float[Array, "T G"],
    interpret: plgpu.InterpretGPUParams | None = None,
    **arrays: Array,
) -> tuple[Float[Array, "T G H"], Float[Array, "T G"]]:
    """As `routed.forward_head`; every candidate in use has `block_size` keys."""
    del length
    here = _Tiles.of(static, start, **arrays)
    head = here.head
    parts, lses = attend.run(
        head.q,
        here.pair,
        here.of_keys(head.k),
        here.of_keys(head.v),
        here.block,
        ranks=here.ranks,
        block_size=here.block_size,
        scale=static.scale,
        interpret=interpret,
    )
    return routed.combine(head.blocks, None, parts, lses, out, lse, unroll=True)


def backward_head(
    static: Static,
    start: Int[Array, "C"],
    length: Int[Array, "C"],
    *,
    d_out: Float[Array, "T G H"],
    lse: Float[Array, "T G"],
    delta: Float[Array, "T G"],
    dq: Float[Array, "T G H"],
    dk: Float[Array, "S H"],
    dv: Float[Array, "S H"],
    interpret: plgpu.InterpretGPUParams | None = None,
    **arrays: Array,
) -> tuple[Float[Array, "T G H"], Float[Array, "S H"], Float[Array, "S H"]]:
    """As `routed.backward_head`."""
    here = _Tiles.of(static, start, **arrays)
    head = here.head
    stats = [here.of_slots(lse.reshape(-1) * LOG2E, jnp.inf), here.of_slots(delta.reshape(-1), 0.0)]
    of_rows = (head.q, d_out.reshape(head.q.shape), jnp.stack(stats), here.pair)
    keys = (here.of_keys(head.k), here.of_keys(head.v))
    options: dict[str, Any] = {"ranks": here.ranks, "block_size": here.block_size, "scale": static.scale}
    options["interpret"] = interpret
    dq_parts = backward.query_gradients(*of_rows, *keys, here.block, **options)
    dq_parts = dq_parts.reshape(*head.blocks.shape, -1)
    pieces = lists.pieces(here.lists, attend.TILE, here.block.shape[0], LONGEST_PIECE)
    parts = backward.key_gradients(*of_rows, *keys, pieces, **options)

    def add(nth, sums):
        piece = jnp.minimum(pieces.begin + nth, parts[0].shape[0] - 1)
        has = (nth < pieces.per_block)[:, None, None]
        return tuple(total + jnp.where(has, part[piece], 0) for total, part in zip(sums, parts, strict=True))

    # Most lists are one piece, so the first is no addition.
    sums = tuple(part[pieces.begin].astype(jnp.float32) for part in parts)
    sums = jax.lax.fori_loop(1, pieces.per_block.max(), add, sums)
    dq_rows = dq.reshape(head.q.shape).astype(jnp.float32)
    for rank in range(head.blocks.shape[1]):  # written out it is one operation
        dq_rows += jnp.where(head.blocks[:, rank][:, None] >= 0, dq_parts[:, rank], 0)
    split = start.shape[0], static.block_size
    dk, dv = (
        routed.add_to_keys(x, of_blocks.reshape(*split, -1), start, length, aligned=static.aligned)
        for x, of_blocks in zip((dk, dv), sums, strict=True)
    )
    return dq_rows.astype(dq.dtype).reshape(dq.shape), dk, dv


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
            options = {"ranks": 7, "block_size": block_size, "scale": 0.1}
            tiles = array((64,), jnp.int32)
            of_pieces: Any = [array((32,), jnp.int32)] * 5
            rows = keys = array((queries, head_dim), dtype)
            slots = array((tiles.shape[0] * attend.TILE,), jnp.int32)
            gradient = (rows, rows, array((2, *slots.shape), jnp.float32), slots, keys, keys)
            pieces = lists.Pieces(*of_pieces)
            for name, function, avals in (
                ("attend", attend.run, (rows, slots, keys, keys, tiles)),
                ("dq", backward.query_gradients, (*gradient, tiles)),
                ("dk dv", backward.key_gradients, (*gradient, pieces)),
            ):
                yield CompileCase(
                    name=f"moba {name} block={block_size} H={head_dim}",
                    function=functools.partial(function, **options),
                    avals=avals,
                    # Rows come past the registers, and the tensor core may read them only behind a fence.
                    required=("HGMMA", "UTMALDG", "LDGSTS", "FENCE"),
                )

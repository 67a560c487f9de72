"""Hopper kernels of block-routed attention, forward: `select.py` routes, `attend.py` attends to the routed blocks.

What is between them stays in XLA: the lists of queries per block, the gathering of queries into tiles, and the sum of a
query's partial results. The own blocks are left to `flash_attention`. Gradients are those of the XLA path, which takes
outputs and log-sum-exps as they come.

A block of more than 128 keys is attended as several of 128, which the same queries chose.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch
from pallas_kernels.moba import lists, routed, routing, xla
from pallas_kernels.moba.layout import Layout
from pallas_kernels.moba.mosaic_sm90 import attend, select
from pallas_kernels.moba.routed import Static

MAX_RANKS = 15
MAX_BLOCK = 128


def unsupported(
    q: Any, k: Any, v: Any, *, block_size: int, top_k: int, causal: bool, interpret: Any = None
) -> str | None:
    """Why the kernels cannot run this call, in words; None when they can."""
    if (reason := select_unsupported(q, k, top_k=top_k, causal=causal, interpret=interpret)) is not None:
        return reason
    if v.shape[3] != q.shape[3]:
        return f"needs values of the head dim of keys; got {v.shape[3]} and {q.shape[3]}"
    if block_size != 64 and block_size % MAX_BLOCK:
        return f"needs block_size 64 or a multiple of {MAX_BLOCK}; got {block_size}"
    if k.shape[1] < min(block_size, MAX_BLOCK):
        return f"needs at least one block of keys; got {k.shape[1]}"
    return None


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
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"], Int[Array, "B T N top_k"]]:
    """Output, log-sum-exp and selection; see `moba_attention`.

    Raises:
      NotImplementedError: shapes or dtypes that the kernels do not take.
    """
    options: dict[str, Any] = {"block_size": block_size, "top_k": top_k, "causal": causal}
    if (reason := unsupported(q, k, v, **options, interpret=interpret or object())) is not None:
        raise NotImplementedError(f"moba_attention on Hopper {reason}")
    parts: dict[str, Any] = {"choose": choose, "forward": forward_head}
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
    means = routing.means_of_all(k, layout, block_size)
    return select.run(q, means, layout, ranks=ranks, interpret=interpret)


def forward_head(
    static: Static,
    start: Int[Array, "C"],
    length: Int[Array, "C"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    **arrays: Array,
) -> tuple[Float[Array, "T G H"], Float[Array, "T G"]]:
    """As `routed.forward_head`; every candidate in use has `block_size` keys."""
    del length
    block_size = static.block_size
    if (pieces := -(-block_size // MAX_BLOCK)) > 1:
        # Each block is several, chosen together; the lists then hold each pair once for every piece.
        block_size, piece = MAX_BLOCK, jnp.arange(pieces)
        start = (start[:, None] + piece * MAX_BLOCK).reshape(-1)
        blocks = arrays["blocks"]
        split = jnp.where(blocks[..., None] < 0, -1, blocks[..., None] * pieces + piece)
        arrays = arrays | {"blocks": split.reshape(*blocks.shape[:-1], -1)}
    head, grid = routed.Head.of(**arrays), arrays["q"].shape[:2]
    num_blocks, ranks = start.shape[0], head.blocks.shape[1]
    num_tiles = lists.most_tiles(head.blocks.size, num_blocks, attend.TILE)
    of_blocks = lists.invert_selection(head.blocks, num_blocks)
    tiles = lists.cut(of_blocks, attend.TILE, num_tiles)
    slot = (tiles.start[:, None] + jnp.arange(attend.TILE, dtype=jnp.int32)).reshape(-1)
    row = of_blocks.entries.at[slot].get(mode="clip") // ranks
    # Blocks of packed rows begin anywhere, those of a swizzled copy at multiples of 8.
    keys = (start[:, None] + jnp.arange(block_size, dtype=jnp.int32)).reshape(-1)
    parts, lses = attend.run(
        head.q[row],
        head.k.at[keys].get(mode="clip"),
        head.v.at[keys].get(mode="clip"),
        tiles.block,
        tiles.total,
        block_size=block_size,
        scale=static.scale,
        interpret=interpret,
    )
    return routed.combine(head.blocks, tiles.place, parts, lses, grid, unroll=True)


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: both kernels, for every head dim, block size and several numbers of ranks."""
    from pallas_kernels.compile_gate import CompileCase

    array = jax.ShapeDtypeStruct
    queries, dtype = 4096, jnp.bfloat16
    for head_dim in (64, 128):
        for ranks in (1, 7, MAX_RANKS):
            layout = Layout(*(array((1, size), jnp.int32) for size in (64, 64, queries, queries, queries)))

            def route(q, means, layout, ranks=ranks):
                return select.run(q, means, layout, ranks=ranks)

            yield CompileCase(
                name=f"moba select ranks={ranks} H={head_dim}",
                function=route,
                avals=(array((1, queries, 4, head_dim), dtype), array((1, 512, 2, head_dim), dtype), layout),
            )
        for block_size in (64, 128):

            def run(q, k, v, block, total, block_size=block_size):
                return attend.run(q, k, v, block, total, block_size=block_size, scale=0.1)

            tiles = 64
            yield CompileCase(
                name=f"moba attend block={block_size} H={head_dim}",
                function=run,
                avals=(
                    array((tiles * attend.TILE, head_dim), dtype),
                    array((queries, head_dim), dtype),
                    array((queries, head_dim), dtype),
                    array((tiles,), jnp.int32),
                    array((), jnp.int32),
                ),
            )

"""Portable block-routed attention: routing, the own block by `flash_attention`, the others added by `routed.py`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import flash_attention
from pallas_kernels.masks import Causal, SlidingWindow
from pallas_kernels.moba import layout as layouts
from pallas_kernels.moba import routed, routing
from pallas_kernels.moba.layout import Layout
from pallas_kernels.moba.routed import Tiling

Segments = tuple[Array, Array]  # of queries [B, T] and keys [B, S], int32


def unsupported(q: Array, k: Array, segments: Segments | None, *, top_k: int, causal: bool) -> str | None:
    """Why this call cannot run here, in words; None when it can."""
    if segments is not None and not causal:
        return "segment_ids need causal=True"
    pairs = q.shape[1] * (q.shape[2] // k.shape[2]) * top_k
    if pairs >= 2**30:  # with their padding to whole tiles they are counted in int32
        return f"T * N / K * top_k must be below 2^30; got {pairs}"
    return None


def make_layout(q: Array, k: Array, segments: Segments | None, *, block_size: int, causal: bool) -> Layout:
    if segments is None:
        return layouts.of_one_sequence(q.shape[0], q.shape[1], k.shape[1], block_size, causal=causal)
    return layouts.of_segments(*segments, block_size)


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    segments: Segments | None,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    choose: routing.Choose | None = None,
) -> Int[Array, "B T N top_k"]:
    """See `moba_select`."""
    layout = make_layout(q, k, segments, block_size=block_size, causal=causal)
    return routing.select(q, k, layout, block_size=block_size, top_k=top_k, causal=causal, choose=choose)


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    segments: Segments | None,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    scale: float,
    own_implementation: str | None = "xla",
    tiling: Tiling | None = None,
    choose: routing.Choose | None = None,
    forward: routed.OfHead | None = None,
    backward: routed.OfHead | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"], Int[Array, "B T N top_k"]]:
    """Output, log-sum-exp and selection; see `moba_attention`.

    The own blocks are left to `flash_attention` with the implementation given, the others to `routed.attend`. `choose`,
    `forward` and `backward` replace the routing and what the latter does for a head.
    """
    layout = make_layout(q, k, segments, block_size=block_size, causal=causal)
    indices = routing.select(q, k, layout, block_size=block_size, top_k=top_k, causal=causal, choose=choose)
    num_blocks = layout.block_start.shape[1]
    others = indices[..., int(causal) :][..., :num_blocks]
    own: routed.Own | None = None
    operands: tuple[Array, ...] = ()
    if causal:
        flash = functools.partial(flash_attention, scale=scale, return_lse=True, implementation=own_implementation)
        if segments is None:
            at_once = None if own_implementation == "mosaic" else 2**22  # a kernel holds no scores
            own = functools.partial(_own_blocks, flash, block_size, at_once)
        else:
            own = functools.partial(_own_blocks_of_segments, flash, block_size)
            operands = layouts.own_blocks(layout, *segments, block_size)
            if segments[0] is not segments[1]:  # else every real query stands at its own index
                operands += (layout.key,)
        if not others.shape[3]:
            return *own(q, k, v, *operands), indices
    options: dict[str, Any] = {"tiling": tiling, "forward": forward, "backward": backward, "aligned": segments is None}
    options |= {"own": own, "own_operands": operands, "block_size": block_size, "scale": scale}
    return *routed.attend(q, k, v, layout, others, **options), indices


def _own_blocks(
    flash: Callable[..., Any], block_size: int, scores_at_once: int | None, q: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """Causal attention inside each block, the blocks of one sequence as rows of a batch."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    begin = max(0, num_keys - num_queries) // block_size * block_size  # of the first query's own block
    shift = num_keys - num_queries - begin  # where query 0 stands on the grid that begins there
    num_blocks = -(-(num_keys - begin) // block_size)
    blank = num_blocks * block_size - (num_keys - begin)
    chunk = num_blocks
    if scores_at_once is not None:  # what a step of that attention should hold at most
        chunk = max(1, min(chunk, scores_at_once // max(1, batch * num_heads * min(block_size, 512) ** 2)))
    num_chunks = -(-num_blocks // chunk)
    blank += (num_chunks * chunk - num_blocks) * block_size

    def cut(x, first):
        x = jnp.pad(x[:, max(0, -first) :], ((0, 0), (max(0, first), blank), (0, 0), (0, 0)))
        x = x.reshape(batch, num_chunks, chunk * block_size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(num_chunks, batch * chunk, block_size, *x.shape[3:])

    chunks = (cut(q, shift), cut(k[:, begin:], 0), cut(v[:, begin:], 0))
    if num_chunks == 1:
        out, lse = jax.tree.map(lambda x: x[None], flash(*(x[0] for x in chunks), mask=Causal()))
    else:
        out, lse = jax.lax.map(lambda x: flash(*x, mask=Causal()), chunks)
    lse = jnp.swapaxes(lse, 2, 3)

    def join(x, empty):
        x = x.reshape(num_chunks, batch, chunk * block_size, *x.shape[3:])
        x = jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * chunk * block_size, *x.shape[3:])
        x = x[:, max(0, shift) : num_keys - begin]
        missing = num_queries - x.shape[1]  # leading queries before the first key
        return jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=empty)

    return join(out, 0), jnp.swapaxes(join(lse, -jnp.inf), 1, 2)


def _own_blocks_of_segments(
    flash: Callable[..., Any],
    block_size: int,
    q: Array,
    k: Array,
    v: Array,
    q_blocks: Int[Array, "B T"],
    k_blocks: Int[Array, "B S"],
    key: Int[Array, "B T"] | None = None,
) -> tuple[Array, Array]:
    """The same where blocks begin anywhere: a window of one block, with the blocks as segments.

    `key` is that at each query's position, of the same index unless given; negative sees nothing.
    """
    window = SlidingWindow(block_size)
    if key is None:
        return flash(q, k, v, mask=window, segment_ids=(q_blocks, k_blocks))
    # Queries move to the index of the key at their position, and back.
    num_queries, num_keys = q.shape[1], k.shape[1]
    to_key = jnp.where(key >= 0, key, num_keys)
    query = jnp.arange(num_queries, dtype=jnp.int32)
    at_key = jax.vmap(lambda at: jnp.full((num_keys,), num_queries, jnp.int32).at[at].set(query, mode="drop"))(to_key)

    def move(x, index, fill):
        return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=fill))(x, index)

    out, lse = flash(move(q, at_key, 0), k, v, mask=window, segment_ids=(move(q_blocks, at_key, -1), k_blocks))
    return move(out, to_key, 0), jnp.swapaxes(move(jnp.swapaxes(lse, 1, 2), to_key, -jnp.inf), 1, 2)

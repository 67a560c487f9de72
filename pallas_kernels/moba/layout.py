"""Where the blocks of a row of the batch lie, and which of them each query may choose from.

A block that a causal query can *choose* lies before its own block and is therefore complete: block_size keys of one
sequence. So however many sequences a row packs, at most S // block_size blocks are candidates, and the candidates of
one sequence are neighbours in their list. The own block is never a candidate: it is always seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Layout(NamedTuple):
    """All int32. C candidate blocks of a row, in the order of their keys; M is T queries, or T * G rows of a head."""

    block_start: Int[Array, "*B C"]  # first key of each candidate
    block_length: Int[Array, "*B C"]  # its keys; 0 is an unused place in the list
    first: Int[Array, "*B M"]  # first candidate of the query's sequence: its block 0
    eligible: Int[Array, "*B M"]  # candidates, from `first` on, that the query may choose from
    key: Int[Array, "*B M"]  # key at the query's own position; negative sees nothing


def of_one_sequence(batch: int, num_queries: int, num_keys: int, block_size: int, *, causal: bool) -> Layout:
    """Every row is one sequence; the last query stands at the last key."""
    key = jnp.arange(num_queries, dtype=jnp.int32) + (num_keys - num_queries)
    if causal:
        num_blocks = num_keys // block_size
        eligible = jnp.maximum(key, 0) // block_size
    else:
        num_blocks = -(-num_keys // block_size)
        eligible = jnp.full_like(key, num_blocks)
    start = jnp.arange(num_blocks, dtype=jnp.int32) * block_size
    layout = Layout(start, jnp.minimum(block_size, num_keys - start), jnp.zeros_like(key), eligible, key)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), layout)


def of_segments(q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], block_size: int) -> Layout:
    """Every segment id is a sequence of its own, causal, its last query at its last key; negative ids are padding."""

    def one_row(q_ids: Int[Array, "T"], k_ids: Int[Array, "S"]) -> Layout:
        num_keys = k_ids.shape[0]
        own_start, _ = _runs(k_ids, k_ids)
        place = jnp.arange(num_keys, dtype=jnp.int32) - own_start
        completes = (k_ids >= 0) & (place % block_size == block_size - 1)
        total = jnp.cumsum(completes, dtype=jnp.int32)  # complete blocks up to and including each key
        num_blocks = num_keys // block_size
        ends = jnp.nonzero(completes, size=num_blocks, fill_value=num_keys)[0].astype(jnp.int32)
        used = ends < num_keys
        k_start, k_count = _runs(k_ids, q_ids)
        q_start, q_count = _runs(q_ids, q_ids)
        position = jnp.arange(q_ids.shape[0], dtype=jnp.int32) - q_start + k_count - q_count
        seen = (q_ids >= 0) & (position >= 0)
        return Layout(
            block_start=jnp.where(used, ends - (block_size - 1), 0),
            block_length=jnp.where(used, block_size, 0),
            first=total[k_start] - completes[k_start],
            eligible=jnp.where(seen, position // block_size, 0),
            key=jnp.where(seen, k_start + position, -1),
        )

    return jax.vmap(one_row)(q_segments, k_segments)


def _runs(ids: Int[Array, "S"], wanted: Int[Array, "M"]) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
    """First index and length of the run of each wanted id among `ids`, in which equal ids are neighbours."""
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    ordered = ids[order]
    left = jnp.searchsorted(ordered, wanted, side="left").astype(jnp.int32)
    right = jnp.searchsorted(ordered, wanted, side="right").astype(jnp.int32)
    return order[jnp.minimum(left, ids.shape[0] - 1)], right - left


def own_blocks(layout: Layout, q_segments: Array, k_segments: Array, block_size: int) -> tuple[Array, Array]:
    """One id per own block for queries [B, T] and keys [B, S]: the index of the block's first key; -1 is padding."""

    def one_row(q_ids, k_ids, key):
        index = jnp.arange(k_ids.shape[0], dtype=jnp.int32)
        start, _ = _runs(k_ids, k_ids)
        blocks = jnp.where(k_ids >= 0, index - (index - start) % block_size, -1)
        return jnp.where(key >= 0, blocks[key], -1), blocks

    return jax.vmap(one_row)(q_segments, k_segments, layout.key)

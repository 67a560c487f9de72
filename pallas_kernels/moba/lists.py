"""From "which blocks does each query see" to "which queries see each block", with static shapes and no atomics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class BlockLists(NamedTuple):
    """The pairs (row, rank) of a selection, block by block. All int32."""

    offsets: Int[Array, "*lead blocks_and_1"]  # the list of block c is entries[offsets[c] : offsets[c + 1]]
    entries: Int[Array, "*lead pairs"]  # row * ranks + rank, ascending within a list; the spare ones come last


def invert_selection(indices: Int[Array, "*lead M ranks"], num_blocks: int) -> BlockLists:
    """Sorts the pairs of a selection by block; negative indices are spare and belong to no list.

    Lists may be of any length, from none to all rows; together they have a fixed number of places, M * ranks.

    Args:
      indices: block of each (row, rank), in -1..num_blocks - 1; any leading axes are independent selections.
      num_blocks: static.
    """
    *lead, num_rows, ranks = indices.shape
    if num_rows * ranks >= 2**31:
        raise ValueError(f"indices must have fewer than 2^31 pairs (rows * ranks); got {num_rows} * {ranks}")

    # A radix sort, as XLA has for GPUs, goes over the pairs once for every eight bits of a key.
    key_dtype = np.min_scalar_type(num_blocks)

    def one(indices: Array) -> BlockLists:
        keys = jnp.where(indices < 0, num_blocks, indices).reshape(-1).astype(key_dtype)
        pairs = jnp.arange(num_rows * ranks, dtype=jnp.int32)
        blocks, entries = jax.lax.sort((keys, pairs), is_stable=True, num_keys=1)
        starts = _search(blocks.astype(jnp.int32), jnp.arange(num_blocks + 1, dtype=jnp.int32), side="left")
        return BlockLists(starts.astype(jnp.int32), entries)

    lists = jax.vmap(one)(indices.reshape(-1, num_rows, ranks))
    return jax.tree.map(lambda x: x.reshape(*lead, x.shape[-1]), lists)


class Tiles(NamedTuple):
    """The lists cut into tiles of rows. Each block has at least one tile, so tile + 1 is of the same or next block."""

    block: Int[Array, "tiles"]
    start: Int[Array, "tiles"]  # first entry
    size: Int[Array, "tiles"]  # entries in use; 0 for tiles of an empty list and beyond the last tile
    total: Int[Array, ""]  # tiles in use; they come first
    place: Int[Array, "pairs"]  # where each pair (row * ranks + rank) lies among the rows of all tiles


def most_tiles(num_pairs: int, num_blocks: int, tile_rows: int) -> int:
    return num_pairs // tile_rows + num_blocks


def cut(lists: BlockLists, tile_rows: int, num_tiles: int) -> Tiles:
    """Tiles of at most `tile_rows` entries; `num_tiles` is at least `most_tiles`."""
    offsets, entries = lists
    counts = offsets[1:] - offsets[:-1]
    per_block = jnp.maximum(1, -(-counts // tile_rows))
    ends = jnp.cumsum(per_block, dtype=jnp.int32)
    begins = ends - per_block
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    block = jnp.minimum(_search(ends, tile, side="right"), counts.shape[0] - 1).astype(jnp.int32)
    done = (tile - begins[block]) * tile_rows
    rank = jnp.arange(entries.shape[0], dtype=jnp.int32)
    its_block = jnp.minimum(_search(offsets[1:], rank, side="right"), counts.shape[0] - 1)
    row = begins[its_block] * tile_rows + rank - offsets[its_block]
    return Tiles(
        block=block,
        start=offsets[block] + done,
        size=jnp.clip(counts[block] - done, 0, tile_rows),
        total=ends[-1],
        place=jnp.zeros_like(row).at[entries].set(row, unique_indices=True),
    )


class Pieces(NamedTuple):
    """Runs of tiles of one block each, no longer than a limit. All int32."""

    block: Int[Array, "pieces"]
    first: Int[Array, "pieces"]  # first tile
    size: Int[Array, "pieces"]  # tiles; 0 beyond the last piece
    begin: Int[Array, "blocks"]  # first piece of each block
    per_block: Int[Array, "blocks"]  # at least one


def most_pieces(num_tiles: int, num_blocks: int, longest: int) -> int:
    return num_tiles // longest + num_blocks


def pieces(lists: BlockLists, tile_rows: int, num_tiles: int, longest: int) -> Pieces:
    """The tiles of `cut` in pieces of at most `longest`."""
    lengths = lists.offsets[1:] - lists.offsets[:-1]
    tiles = jnp.maximum(1, -(-lengths // tile_rows))
    per_block = -(-tiles // longest)
    ends = jnp.cumsum(per_block, dtype=jnp.int32)
    begin, begin_tile = ends - per_block, jnp.cumsum(tiles, dtype=jnp.int32) - tiles
    piece = jnp.arange(most_pieces(num_tiles, lengths.shape[0], longest), dtype=jnp.int32)
    block = jnp.minimum(_search(ends, piece, side="right"), lengths.shape[0] - 1).astype(jnp.int32)
    done = (piece - begin[block]) * longest
    size = jnp.clip(tiles[block] - done, 0, longest)
    return Pieces(block, begin_tile[block] + done, size, begin, per_block)


def _search(sorted_values: Array, values: Array, *, side: str) -> Array:
    """`jnp.searchsorted`: on a GPU written out, as one operation; a loop is twenty of three, whose starts it waits for.

    Elsewhere a loop: XLA's CPU backend takes minutes to compile many of the former.
    """
    method = "scan_unrolled" if jax.default_backend() == "gpu" else "scan"
    return jnp.searchsorted(sorted_values, values, side=side, method=method)

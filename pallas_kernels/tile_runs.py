"""Tile schedules as short tables of runs, the form in which kernels read them.

The tiles that a structured mask leaves alive form a few runs of neighbours in each row of tiles: causal has one
run of full tiles and one of partial tiles, a window with sinks two and three. A table of runs grows with T, not with
T x S, and a kernel finds its i-th tile with a few scalar comparisons.

Table layout, int32, one line per row of tiles, rows with most work first (so that the last CTAs are short):

    tile, (start, length) * num_full, (start, length) * num_partial

`tile` is the index of the row; full runs need no masking, partial ones evaluate the mask. Unused runs have length 0.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True, eq=False)
class TileRuns:
    """A table of runs: `table` is `[1 or batch, rows, 1 + 2 * (num_full + num_partial)]`."""

    table: np.ndarray | Array
    num_full: int
    num_partial: int


class TileLimits(NamedTuple):
    """What run-time limits leave of each row of tiles: all live tiles lie in `[live_start, live_stop)`, all tiles in
    `[full_start, full_stop)` need no masking. Arrays `[batch, rows]`, by tile index."""

    live_start: Array
    live_stop: Array
    full_start: Array
    full_stop: Array


def _runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _table(full: list[list[tuple[int, int]]], partial: list[list[tuple[int, int]]]) -> TileRuns:
    num_full = max(map(len, full), default=0)
    num_partial = max(map(len, partial), default=0)
    work = [sum(n for _, n in [*f, *p]) for f, p in zip(full, partial, strict=True)]
    order = np.argsort(-np.asarray(work), kind="stable")
    table = np.zeros((1, len(full), 1 + 2 * (num_full + num_partial)), np.int32)
    for line, tile in enumerate(order):
        table[0, line, 0] = tile
        for column, runs in ((1, full[tile]), (1 + 2 * num_full, partial[tile])):
            for i, run in enumerate(runs):
                table[0, line, column + 2 * i : column + 2 * i + 2] = run
    return TileRuns(table, num_full, num_partial)


@functools.lru_cache(maxsize=256)
def mask_runs(
    mask: Mask,
    num_queries: int,
    num_keys: int,
    tile_q: int,
    tile_k: int,
    *,
    by_key: bool = False,
    all_partial: bool = False,
) -> TileRuns:
    """The runs of a mask's schedule: key tiles of each query tile, or with `by_key` query tiles of each key tile.

    With `all_partial` full tiles count as partial too, so that each row lists its tiles in ascending order.
    """
    schedule = mask.schedule(num_queries, num_keys, tile_q, tile_k)
    partial = schedule.is_partial
    live = np.zeros_like(partial)
    for row, tiles in enumerate(schedule.q_to_k):
        live[row, tiles] = True
    if by_key:
        live, partial = live.T, partial.T
    if all_partial:
        partial = live
    return _table([_runs_of(row) for row in live & ~partial], [_runs_of(row) for row in partial])


@functools.lru_cache(maxsize=256)
def all_runs(num_rows: int, num_columns: int) -> TileRuns:
    """Every tile, and each of them partial: where the mask compares positions that only the run time knows."""
    return _table([[]] * num_rows, [[(0, num_columns)]] * num_rows)


def tile_limits(live: Array, full: Array) -> TileLimits:
    """Limits from bool arrays `[batch, rows, columns]`. Full tiles with a gap between them count as partial."""

    def first_and_stop(flags):
        columns = flags.shape[-1]
        first = jnp.argmax(flags, axis=-1)
        stop = columns - jnp.argmax(flags[..., ::-1], axis=-1)
        return first, jnp.where(flags.any(axis=-1), stop, first)

    live_start, live_stop = first_and_stop(live)
    full = full & live
    full_start, full_stop = first_and_stop(full)
    full_stop = jnp.where(full_stop - full_start == full.sum(axis=-1), full_stop, full_start)
    return TileLimits(live_start, live_stop, full_start, full_stop)


def limit_runs(runs: TileRuns, limits: TileLimits) -> TileRuns:
    """Cuts static runs down to what run-time limits leave; a full run may lose tiles at both ends to partial runs."""
    table = jnp.asarray(runs.table)
    at = table[0, :, 0]  # the limits of each line's tile
    live_start, live_stop, full_start, full_stop = (jnp.asarray(x, jnp.int32)[:, at] for x in limits)

    def cut(start, stop, lower, upper):
        start, stop = jnp.maximum(start, lower), jnp.minimum(stop, upper)
        return jnp.stack([start, jnp.maximum(stop - start, 0)], axis=-1)

    full, partial = [], []
    for i in range(runs.num_full + runs.num_partial):
        start = table[:, :, 1 + 2 * i]
        stop = start + table[:, :, 2 + 2 * i]
        if i < runs.num_full:
            # Clamping the split points into the live range keeps the three pieces disjoint and complete.
            first = jnp.clip(full_start, live_start, live_stop)
            last = jnp.clip(full_stop, first, live_stop)
            full.append(cut(start, stop, first, last))
            partial.append(cut(start, stop, live_start, first))
            partial.append(cut(start, stop, last, live_stop))
        else:
            partial.append(cut(start, stop, live_start, live_stop))
    batch = live_start.shape[0]
    tile = jnp.broadcast_to(table[:, :, :1], (batch, table.shape[1], 1))
    return TileRuns(jnp.concatenate([tile, *full, *partial], axis=-1), len(full), len(partial))

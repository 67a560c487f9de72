"""What the forward and backward kernels share inside: layouts, visits, visibility, and products in registers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.mosaic_sm90.operands import FAR
from pallas_kernels.masks import Mask
from pallas_kernels.tile_runs import TileRuns

LOG2E = math.log2(math.e)
COMPUTE_WARPGROUPS = 2

WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)

Runs = list[tuple[Any, Any]]  # (first tile, length), scalars


def read_runs(table_ref: Any, batch: Any, line: Any, runs: TileRuns) -> tuple[Any, Runs, Runs]:
    """The tile of one line of the table, its full runs and its partial runs."""
    at = (batch if runs.table.shape[0] > 1 else 0, line)
    found = [(table_ref[*at, c], table_ref[*at, c + 1]) for c in range(1, runs.table.shape[2], 2)]
    return table_ref[*at, 0], found[: runs.num_full], found[runs.num_full :]


def count(runs: Runs) -> Any:
    """Number of tiles."""
    return sum((length for _, length in runs), jnp.int32(0))


def tile_of_step(step: Any, runs: Runs) -> Any:
    """Index of the tile that is the `step`-th of the runs put end to end."""
    tile, begin = jnp.int32(0), jnp.int32(0)
    for start, length in runs:
        # An empty run begins where its successor begins, which overrides it.
        tile = jnp.where(step >= begin, step - begin + start, tile)
        begin = begin + length
    return tile


def opaque(index: Any) -> Any:
    """The same index, in a form that the compiler cannot move out of a loop.

    For the operands of wgmma that stay the same over a loop: their descriptors, one per 16 elements of the inner axis,
    would all be computed before it and then be spilled for want of registers.
    """
    return lax.optimization_barrier(index)


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which pairs of a partial tile may attend, evaluated in registers.

    Attributes:
      mask, num_queries, num_keys: the static structure.
      refs: the kernel's references to the arrays of `Operands`, by name; None for those that the call lacks.
      batch: the row of the batch.
      shape: of the accumulator tile.
      query_axis: 0 when its rows are queries, 1 when they are keys.
    """

    mask: Mask
    num_queries: int
    num_keys: int
    refs: dict[str, Any]
    batch: Any
    shape: tuple[int, int]
    query_axis: int = 0

    def _load(self, name: str, first: Any, axis: int) -> Array:
        index = (self.batch, pl.ds(first, self.shape[axis]))
        return plgpu.load(self.refs[name].at[index], layout=(ROW, COLUMN)[axis], optimized=False)

    def _spread(self, x: Array, axis: int) -> Array:
        return lax.broadcast_in_dim(x, self.shape, [axis])

    def visible(self, first_query: Any, first_key: Any) -> Array:
        """Bool tile whose first query and key have these indices."""
        of_query, of_key = self.query_axis, 1 - self.query_axis
        if self.refs["q_positions"] is None:
            layout = (ROW, COLUMN)[of_query]
            index = plgpu.broadcasted_iota(jnp.int32, (self.shape[of_query],), 0, layout=layout)
            index = index + (first_query + self.mask.query_offset(self.num_queries, self.num_keys))
            end = self.num_keys if self.refs["kv_lengths"] is None else self.refs["kv_lengths"][self.batch]
            intervals, origin = self.mask.key_intervals(index, self.num_keys), first_key
            keys = plgpu.broadcasted_iota(jnp.int32, self.shape, of_key, layout=WGMMA)
        else:
            index, end = self._load("q_positions", first_query, of_query), FAR
            intervals, origin = self.mask.key_intervals(index, FAR), 0
            keys = self._spread(self._load("k_positions", first_key, of_key), of_key)
        keep: Any = None
        for start, stop in intervals:
            # Ends that are the same for all queries would leave the compiler without a layout to infer; the bounds
            # FAR away change nothing and tie them to the queries.
            start = jnp.maximum(jnp.maximum(start, 0), index - FAR) - origin
            stop = jnp.minimum(jnp.minimum(stop, end), index + FAR) - origin
            inside = (keys >= self._spread(start, of_query)) & (keys < self._spread(stop, of_query))
            keep = inside if keep is None else keep | inside
        if self.refs["q_segments"] is not None:
            q_segments = self._spread(self._load("q_segments", first_query, of_query), of_query)
            same = q_segments == self._spread(self._load("k_segments", first_key, of_key), of_key)
            keep = same if keep is None else keep & same
        return keep


Flags = Callable[[Any], tuple[Any, Any]]  # of a step, for each compute warpgroup: 1 if it takes part, 0 if it skips


def consume(
    start: Any,
    stop: Any,
    step: Callable[[Any, Any, Any], Any],
    sums: Any,
    *,
    loaded: Any = 0,
    flags: Flags | None = None,
    warpgroup: Any = None,
    ignore: Callable[[Any], None] = lambda nth: None,
) -> tuple[Any, Any]:
    """Steps `start` to `stop` of a compute warpgroup: `sums = step(i, nth, sums)` with `nth` the loads before it.

    Without `flags` each step has a load. With them a step is loaded when either warpgroup takes part in it; one that
    does not calls `ignore(nth)`, which passes the step's barriers, or does nothing if there was no load. Returns the
    sums and the number of loads so far, `loaded` before the first step included.
    """
    if flags is None:
        return lax.fori_loop(start, stop, lambda i, sums: step(i, i, sums), sums), stop

    def body(i, carry):
        sums, nth, (first, second) = carry
        following = flags(jnp.minimum(i + 1, jnp.maximum(stop - 1, start)))  # ahead of time: memory is far
        is_loaded = jnp.maximum(first, second)

        def attend(sums):
            return step(i, nth, sums)

        def pass_by(sums):
            pl.when(is_loaded != 0)(lambda: ignore(nth))
            return sums

        sums = lax.cond(jnp.where(warpgroup == 0, first, second) != 0, attend, pass_by, sums)
        return sums, nth + is_loaded, following

    sums, loaded, _ = lax.fori_loop(start, stop, body, (sums, jnp.int32(loaded), flags(jnp.int32(start))))
    return sums, loaded


def supply(num_steps: Any, load: Callable[[Any, Any], None], *, flags: Flags | None = None) -> Any:
    """The other side of `consume`, for the loading warpgroup: `load(i, nth)`; returns the number of loads."""
    if flags is None:
        pl.loop(0, num_steps)(lambda i: load(i, i))
        return num_steps

    def body(i, carry):
        nth, (first, second) = carry
        following = flags(jnp.minimum(i + 1, num_steps - 1))
        is_loaded = jnp.maximum(first, second)
        pl.when(is_loaded != 0)(lambda: load(i, nth))
        return nth + is_loaded, following

    return lax.fori_loop(0, num_steps, body, (jnp.int32(0), flags(jnp.int32(0))))[0]


def accumulate(
    products: Sequence[tuple[Array, Callable[[], Array], Any]],
    *,
    interpreted: bool,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Array]:
    """`acc + left @ right` of each product (accumulator, function giving the left operand in registers, right
    operand in shared memory), in order.

    The left operand of one product is computed, and in the end `meanwhile` runs, while the tensor core works on the
    products before. The interpreter knows neither a left operand in registers nor an accumulator that does not start
    at zero; this is the one operation that it runs as something else.
    """
    if interpreted:
        results = []
        for acc, left, right in products:
            results.append(acc + jnp.dot(left().astype(jnp.float32), right[...].astype(jnp.float32)))
            plgpu.commit_smem()  # an ordinary read, unlike that of wgmma, must be fenced against the refill by TMA
        meanwhile()
        return results

    def multiply(acc_refs):
        for acc_ref, (_, left, right) in zip(acc_refs, products, strict=True):
            plgpu.wgmma(acc_ref, left(), right)
        meanwhile()

    return pl.run_state(multiply)([plgpu.ACC.init(acc) for acc, _, _ in products])

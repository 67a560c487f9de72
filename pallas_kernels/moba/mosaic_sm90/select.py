"""The routing kernel: the best blocks of 128 queries of one head, over tiles of 128 centroids.

Two warpgroups have 64 queries each and a third fills a ring with centroids by TMA. Scores of a tile stay in registers.
The best of each row are taken out of them one after the other, of equal ones the highest block first, and put into a
sorted list of those found before. Tiles are walked from the last to the first, so an earlier find of the same score is
a higher block and stays ahead. What a row has selected leaves the kernel; scores never do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.attention.mosaic_sm90.operands import pad_tokens
from pallas_kernels.moba.layout import Layout

WARPGROUPS, ROWS = 2, 64  # that compute, and queries of each
TILE = WARPGROUPS * ROWS
COLUMNS = 128  # centroids of a tile
STAGES = 2
WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator


@functools.partial(jax.jit, static_argnames=("ranks", "interpret"))
def run(
    q: Float[Array, "B T N H"],
    means: Float[Array, "B C K H"],
    layout: Layout,
    *,
    ranks: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Int[Array, "B T N ranks"]:
    """The best `ranks` candidates of each query head, counted from its sequence's first; -1 is none. See `choose`."""
    batch, num_queries, num_heads, head_dim = q.shape
    group, num_tiles = num_heads // means.shape[2], -(-num_queries // TILE)
    padding = (0, num_tiles * TILE - num_queries)
    first, eligible = (jnp.pad(x, ((0, 0), padding)) for x in (layout.first, layout.eligible))
    # Tiles of centroids that the queries of each tile may choose from.
    of_tile = lambda x: x.reshape(batch, num_tiles, TILE)  # noqa: E731
    some = of_tile(eligible > 0)
    lowest = jnp.where(some, of_tile(first), means.shape[1]).min(axis=2) // COLUMNS
    highest = -(-jnp.where(some, of_tile(first + eligible), 0).max(axis=2) // COLUMNS)
    i32 = jnp.int32

    def moba_select(refs, out_ref, q_smem, means_smem, out_smem, q_ready, ready, free):
        warpgroup, b, head = (lax.axis_index(name) for name in ("warpgroup", "batch", "head"))
        tile = num_tiles - 1 - lax.axis_index("tile")  # late queries have the most to choose from
        low, high = refs["lowest"][b, tile], refs["highest"][b, tile]
        steps = jnp.maximum(high - low, 0)

        @pl.when(warpgroup < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            row0 = tile * TILE + warpgroup * ROWS
            rows = pl.ds(row0, ROWS)
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, head], q_smem.at[warpgroup], q_ready.at[warpgroup])
            per_row = lambda name: plgpu.load(  # noqa: E731
                refs[name].at[b, rows], layout=ROW, optimized=False
            ).astype(jnp.float32)
            begin = per_row("first")
            end = begin + per_row("eligible")
            spread = lambda x: lax.broadcast_in_dim(x, (ROWS, COLUMNS), [0])  # noqa: E731
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def visit(step, found):
                slot = lax.rem(step, i32(STAGES))
                plgpu.barrier_wait(ready.at[slot])

                def multiply(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem.at[warpgroup], means_smem.at[slot].transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
                plgpu.barrier_arrive(free.at[slot])
                # Numbers of blocks are exact in float32.
                column = plgpu.broadcasted_iota(jnp.float32, (ROWS, COLUMNS), 1, layout=WGMMA)
                column = column + ((high - 1 - step) * COLUMNS).astype(jnp.float32)
                allowed = (column >= spread(begin)) & (column < spread(end)) & (scores == scores)
                scores = jnp.where(allowed, scores, -jnp.inf)
                for _ in range(ranks):
                    best = scores.max(axis=1)
                    at = jnp.where(scores == spread(best), column, -1.0).max(axis=1)
                    scores = jnp.where(column == spread(at), -jnp.inf, scores)
                    found = _insert(found, best, at)
                return found

            nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
            none = plgpu.layout_cast(jnp.full((ROWS,), -1.0, jnp.float32), ROW)
            found = lax.fori_loop(0, steps, visit, ((nothing,) * ranks, (none,) * ranks))
            for rank, (score, at) in enumerate(zip(*found, strict=True)):
                chosen = jnp.where(score > -jnp.inf, at - begin, -1.0)
                out_smem[warpgroup, rank] = chosen.astype(i32)
            plgpu.commit_smem()
            for rank in range(ranks):
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, rank], out_ref.at[b, head, rank, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def fill(step):
                slot = lax.rem(step, i32(STAGES))

                @pl.when(step >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                source = (b, pl.ds((high - 1 - step) * COLUMNS, COLUMNS), lax.div(head, i32(group)))
                plgpu.copy_gmem_to_smem(refs["means"].at[source], means_smem.at[slot], ready.at[slot])

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
            def drain(step):
                plgpu.barrier_wait(free.at[lax.rem(step, i32(STAGES))])

    def matrices(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=compat.swizzled(q.dtype, shape[-1]))

    out = compat.kernel(
        moba_select,
        out_type=jax.ShapeDtypeStruct((batch, num_heads, ranks, num_tiles * TILE), i32),
        grid=(batch, num_heads, num_tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            matrices(WARPGROUPS, ROWS, head_dim),
            matrices(STAGES, COLUMNS, head_dim),
            plgpu.SMEM((WARPGROUPS, ranks, ROWS), i32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ],
        interpret=interpret,
    )(
        {
            "q": pad_tokens(q),
            "means": jnp.pad(means, ((0, 0), (0, -means.shape[1] % COLUMNS), (0, 0), (0, 0))),
            "first": first,
            "eligible": eligible,
            "lowest": lowest,
            "highest": highest,
        }
    )
    return jnp.transpose(out[..., :num_queries], (0, 3, 1, 2))


def _insert(found: Any, score: Array, at: Array) -> Any:
    """The sorted lists with one more entry, behind those of equal score, and without their last."""
    scores, places = found
    ahead = [score > old for old in scores]
    new_scores, new_places = [], []
    for i, is_ahead in enumerate(ahead):
        shifted = (score, at) if i == 0 else (
            jnp.where(ahead[i - 1], scores[i - 1], score),
            jnp.where(ahead[i - 1], places[i - 1], at),
        )  # fmt: skip
        new_scores.append(jnp.where(is_ahead, shifted[0], scores[i]))
        new_places.append(jnp.where(is_ahead, shifted[1], places[i]))
    return tuple(new_scores), tuple(new_places)

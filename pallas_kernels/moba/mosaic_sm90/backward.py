"""The backward kernels of routed blocks, over the tiles of the forward pass; no atomics.

Both compute the probabilities anew from the log-sum-exps of whole rows, `p = exp2(s * scale * log2(e) - lse * log2(e))`
and then `ds = p * (do v^T - delta)`. Slots of no pair have lse = +inf, so that p = 0, and rows of zeros. Queries and
`do` are read where they lie (`rows.py`), their statistics in the order of the slots.

`query_gradients`: one CTA per tile, as the forward kernel: a partial dQ for each of its pairs.

`key_gradients`: one CTA per piece of a list, 64 keys of the block for each of its compute warpgroups, which walk the
queries of the piece 64 at a time; a warpgroup more makes the copies, those of a step while the ones of the step before
arrive. A list is one piece but for the longest ones, of
blocks that most queries choose. Tiles are transposed, rows are keys: P^T and dS^T are the left operands, in registers.

`add_pieces`: the sum of each block's pieces, in their order. One CTA per block, so that a block of many pieces costs
what it has, and not a pass over all blocks for each of them.

P and dS are rounded to the input dtype before their products, and so are the partial results.
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
from pallas_kernels.attention.mosaic_sm90.parts import COLUMN, LOG2E, ROW, WGMMA, accumulate, opaque
from pallas_kernels.moba.lists import Pieces
from pallas_kernels.moba.mosaic_sm90 import rows
from pallas_kernels.moba.mosaic_sm90.attend import ROWS, TILE, WARPGROUPS

STAGES = 3
SHARE = 4096  # numbers of a piece that one CTA adds up, 32 of each array a thread; a divisor of every piece's


@functools.partial(jax.jit, static_argnames=("num_pairs", "block_size", "scale", "interpret"))
def query_gradients(
    q: Float[Array, "R H"],
    d_out: Float[Array, "R H"],
    stats: Float[Array, "2 slots"],
    row: Int[Array, "slots"],
    pair: Int[Array, "slots"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    head: Int[Array, "2"],
    block: Int[Array, "tiles"],
    *,
    num_pairs: int,
    block_size: int,
    scale: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "pairs H"]:
    """Partial dQ. Arguments as in `attend.run`; `stats` are lse * log2(e) and delta."""
    num_tiles, head_dim, dtype = block.shape[0], q.shape[1], q.dtype
    shape, log2_scale, interpreted = (ROWS, block_size), scale * LOG2E, interpret is not None

    def moba_dq(refs, dq_ref, q_smem, do_smem, k_smem, v_smem, kv_ready):
        warpgroup, tile = lax.axis_index("warpgroup"), lax.axis_index("tile")
        slots, block = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), refs["block"][tile]

        @pl.when(block >= 0)
        def _():
            @pl.when(warpgroup == 0)
            def _():
                keys = (refs["head"][0], pl.ds(block * block_size, block_size), refs["head"][1])
                plgpu.copy_gmem_to_smem(refs["k"].at[keys], k_smem, kv_ready.at[0])
                plgpu.copy_gmem_to_smem(refs["v"].at[keys], v_smem, kv_ready.at[1])

            own = ((refs["q"], q_smem.at[warpgroup]), (refs["do"], do_smem.at[warpgroup]))
            rows.start(refs["row"].at[slots], *own, interpreted=interpreted)
            log2_sum_exp, delta = (
                lax.broadcast_in_dim(
                    plgpu.load(refs["stats"].at[which, slots], layout=ROW, optimized=False), shape, [0]
                )
                for which in range(2)
            )
            rows.wait(interpreted=interpreted)
            plgpu.barrier_wait(kv_ready.at[0])

            def score_gradients(s_ref, dp_ref):
                plgpu.wgmma(s_ref, q_smem.at[warpgroup], k_smem.transpose((1, 0)))
                plgpu.barrier_wait(kv_ready.at[1])
                plgpu.wgmma(dp_ref, do_smem.at[warpgroup], v_smem.transpose((1, 0)))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                p = jnp.exp2(s * log2_scale - log2_sum_exp)
                dp = plgpu.wgmma_accumulator_load(dp_ref)
                return (p * (dp - delta)).astype(dtype)

            accumulator = plgpu.ACC(shape, jnp.float32)
            ds = pl.run_scoped(score_gradients, accumulator, accumulator)
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            (dq,) = accumulate([(zeros, lambda: ds, k_smem)], interpreted=interpreted)
            q_smem[warpgroup] = (dq * scale).astype(dtype)
            rows.store(refs["pair"].at[slots], (q_smem.at[warpgroup], dq_ref), interpreted=interpreted)

    own, keys = (_matrices(dtype, *size, head_dim) for size in ((WARPGROUPS, ROWS), (block_size,)))
    return compat.kernel(
        moba_dq,
        out_type=jax.ShapeDtypeStruct((num_pairs, head_dim), dtype),
        grid=(num_tiles,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            own,
            own,
            keys,
            keys,
            plgpu.Barrier(num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )({"q": q, "do": d_out, "stats": stats, "row": row, "pair": pair, "k": k, "v": v, "head": head, "block": block})


@functools.partial(jax.jit, static_argnames=("block_size", "scale", "interpret"))
def key_gradients(
    q: Float[Array, "R H"],
    d_out: Float[Array, "R H"],
    stats: Float[Array, "2 slots"],
    row: Int[Array, "slots"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    head: Int[Array, "2"],
    pieces: Pieces,
    *,
    block_size: int,
    scale: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "pieces block H"], Float[Array, "pieces block H"]]:
    """dK and dV of each piece. Pieces beyond the last write nothing."""
    num_pieces, head_dim, dtype = pieces.block.shape[0], q.shape[1], q.dtype
    warpgroups = block_size // ROWS
    tile, log2_scale, i32, interpreted = (ROWS, ROWS), scale * LOG2E, jnp.int32, interpret is not None

    def moba_dk_dv(refs, dk_ref, dv_ref, k_smem, v_smem, q_smem, do_smem, stats_smem, own_ready, ready, free):
        warpgroup, piece = lax.axis_index("warpgroup"), lax.axis_index("piece")
        first, steps = refs["first"][piece] * TILE, refs["size"][piece] * (TILE // ROWS)

        @pl.when(warpgroup < warpgroups)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            first_key = refs["block"][piece] * block_size + warpgroup * ROWS
            keys = (refs["head"][0], pl.ds(first_key, ROWS), refs["head"][1])
            for name, ref in (("k", k_smem), ("v", v_smem)):
                plgpu.copy_gmem_to_smem(refs[name].at[keys], ref.at[warpgroup], own_ready.at[warpgroup])

            def statistic(slot, which):
                x = plgpu.load(stats_smem.at[slot, which], layout=COLUMN, optimized=False)
                return lax.broadcast_in_dim(x, tile, [1])

            def step(i, carry):
                dk, dv = carry
                slot = lax.rem(i, i32(STAGES))
                plgpu.barrier_wait(ready.at[slot])
                at = opaque(warpgroup)

                def probabilities(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, k_smem.at[at], q_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, v_smem.at[at], do_smem.at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    p = jnp.exp2(s * log2_scale - statistic(slot, 0))
                    return p, plgpu.wgmma_accumulator_load(dp_ref)

                accumulator = plgpu.ACC(tile, jnp.float32)
                p, dp = pl.run_scoped(probabilities, accumulator, accumulator)

                def ds():
                    return (p * (dp - statistic(slot, 1))).astype(dtype)

                dv, dk = accumulate(
                    [(dv, lambda: p.astype(dtype), do_smem.at[slot]), (dk, ds, q_smem.at[slot])],
                    interpreted=interpreted,
                )
                plgpu.barrier_arrive(free.at[slot])
                return dk, dv

            plgpu.barrier_wait(own_ready.at[warpgroup])
            zero = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            dk, dv = lax.fori_loop(0, steps, step, (zero, zero))

            @pl.when(steps > 0)
            def _():
                k_smem[warpgroup] = (dk * scale).astype(dtype)
                v_smem[warpgroup] = dv.astype(dtype)
                plgpu.commit_smem()
                half = pl.ds(warpgroup * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(k_smem.at[warpgroup], dk_ref.at[piece, half])
                plgpu.copy_smem_to_gmem(v_smem.at[warpgroup], dv_ref.at[piece, half])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            def announce(i):
                plgpu.barrier_arrive(ready.at[lax.rem(i, i32(STAGES))])

            @pl.loop(0, steps)
            def fill(i):
                slot = lax.rem(i, i32(STAGES))

                @pl.when(i >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.commit_smem()  # the statistics of this slot were read by ordinary loads

                slots = pl.ds(first + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs["stats"].at[:, slots], stats_smem.at[slot], ready.at[slot])
                copies = ((refs["q"], q_smem.at[slot]), (refs["do"], do_smem.at[slot]))
                rows.start(refs["row"].at[slots], *copies, interpreted=interpreted)

                @pl.when(i > 0)
                def _():
                    rows.wait(pending=1, interpreted=interpreted)
                    announce(i - 1)

            @pl.when(steps > 0)
            def _():
                rows.wait(interpreted=interpreted)
                announce(steps - 1)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
            def drain(i):
                plgpu.barrier_wait(free.at[lax.rem(i, i32(STAGES))])

    own, ring = (_matrices(dtype, count, ROWS, head_dim) for count in (warpgroups, STAGES))
    sums = jax.ShapeDtypeStruct((num_pieces, block_size, head_dim), dtype)
    return compat.kernel(
        moba_dk_dv,
        out_type=(sums, sums),
        grid=(num_pieces,),
        grid_names=("piece",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            own,
            own,
            ring,
            ring,
            plgpu.SMEM((STAGES, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        {
            "q": q,
            "do": d_out,
            "stats": stats,
            "row": row,
            "k": k,
            "v": v,
            "head": head,
            "block": pieces.block,
            "first": pieces.first,
            "size": pieces.size,
        }
    )


@functools.partial(jax.jit, static_argnames=("interpret",))
def add_pieces(
    parts: tuple[Float[Array, "pieces block H"], ...],
    pieces: Pieces,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "blocks block H"], ...]:
    """Of each array the sums over the pieces of each block, in float32 and then rounded to its dtype."""
    num_blocks, shape, dtype = pieces.begin.shape[0], parts[0].shape[1:], parts[0].dtype
    size = shape[0] * shape[1]
    layout = plgpu.Layout.WG_STRIDED((SHARE,), vec_size=16 // dtype.itemsize)

    def moba_add_pieces(refs, *out_refs):
        block, nth = lax.axis_index("block"), lax.axis_index("share")
        first, count = refs["begin"][block], refs["per_block"][block]

        def of(piece):
            return pl.ds(piece * size + nth * SHARE, SHARE)

        def load(piece):
            found = (plgpu.load(ref.at[of(piece)], layout=layout, optimized=False) for ref in refs["parts"])
            return tuple(x.astype(jnp.float32) for x in found)

        def add(i, sums):
            return tuple(total + x for total, x in zip(sums, load(first + i), strict=True))

        for ref, total in zip(out_refs, lax.fori_loop(1, count, add, load(first)), strict=True):
            ref[of(block)] = total.astype(dtype)

    sums = compat.kernel(
        moba_add_pieces,
        out_type=tuple(jax.ShapeDtypeStruct((num_blocks * size,), dtype) for _ in parts),
        grid=(num_blocks, size // SHARE),
        grid_names=("block", "share"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )({"parts": tuple(x.reshape(-1) for x in parts), "begin": pieces.begin, "per_block": pieces.per_block})
    return tuple(x.reshape(num_blocks, *shape) for x in sums)


def _matrices(dtype: Any, *shape: int) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=compat.swizzled(dtype, shape[-1]))

"""The kernel of routed blocks: 128 queries against the one block of keys that all of them chose.

A tile is one CTA: two warpgroups of 64 queries, read where they lie (`rows.py`), share keys and values. There is one
block and hence no loop: scores, softmax, product, and a partial output with its log-sum-exp. Several CTAs share a
multiprocessor, so that one loads while another multiplies. Tiles beyond the last write nothing, and what stands there
is never read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.attention.mosaic_sm90.parts import LOG2E, WGMMA, accumulate
from pallas_kernels.moba.mosaic_sm90 import rows

WARPGROUPS, ROWS = 2, 64
TILE = WARPGROUPS * ROWS


@functools.partial(jax.jit, static_argnames=("num_pairs", "block_size", "scale", "interpret"))
def run(
    q: Float[Array, "R H"],
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
) -> tuple[Float[Array, "pairs H"], Float[Array, "pairs"]]:
    """Partial outputs in the dtype of `q`, and natural log-sum-exps.

    Args:
      q: queries of all heads.
      row: of each slot, in tiles of 128: its query; negative is none.
      pair: of each slot: where its results go; negative is none. What is not written holds anything.
      k: keys, of a head those of one block after the other; what is beyond the last block is not read.
      v: values.
      head: which row of the batch and key head are read.
      block: of each tile; negative for tiles that are not in use.
      num_pairs: places for results.
      block_size: 64 or 128.
      scale: of scores.
      interpret: runs the kernel on the CPU, for tests.
    """
    num_tiles, head_dim, dtype = block.shape[0], q.shape[1], q.dtype
    shape, log2_scale, interpreted = (ROWS, block_size), scale * LOG2E, interpret is not None

    def moba_attend(refs, out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, kv_ready):
        warpgroup, tile = lax.axis_index("warpgroup"), lax.axis_index("tile")
        slots, block = pl.ds(tile * TILE + warpgroup * ROWS, ROWS), refs["block"][tile]

        @pl.when(block >= 0)
        def _():
            @pl.when(warpgroup == 0)
            def _():
                keys = (refs["head"][0], pl.ds(block * block_size, block_size), refs["head"][1])
                plgpu.copy_gmem_to_smem(refs["k"].at[keys], k_smem, kv_ready.at[0])
                plgpu.copy_gmem_to_smem(refs["v"].at[keys], v_smem, kv_ready.at[1])

            rows.start(refs["row"].at[slots], (refs["q"], q_smem.at[warpgroup]), interpreted=interpreted)
            rows.wait(interpreted=interpreted)
            plgpu.barrier_wait(kv_ready.at[0])

            def multiply(acc_ref):
                plgpu.wgmma(acc_ref, q_smem.at[warpgroup], k_smem.transpose((1, 0)))
                return acc_ref[...]

            s = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
            # A row that no key can reach, for infinite keys, would compute -inf + inf.
            top = s.max(axis=1) * log2_scale
            top = jnp.where(top == -jnp.inf, 0.0, top)
            p = jnp.exp2(s * log2_scale - lax.broadcast_in_dim(top, shape, [0]))
            sums = p.sum(axis=1)
            plgpu.barrier_wait(kv_ready.at[1])
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            (acc,) = accumulate([(zeros, lambda: p.astype(dtype), v_smem)], interpreted=interpreted)
            inverse = jnp.where(sums == 0.0, 0.0, 1.0 / jnp.where(sums == 0.0, 1.0, sums))
            q_smem[warpgroup] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
            lse_smem[warpgroup] = jnp.where(sums == 0.0, -jnp.inf, (top + jnp.log2(sums)) * (1.0 / LOG2E))
            results = ((q_smem.at[warpgroup], out_ref), (lse_smem.at[warpgroup], lse_ref))
            rows.store(refs["pair"].at[slots], *results, interpreted=interpreted)

    def matrices(*shape):
        return plgpu.SMEM(shape, dtype, transforms=compat.swizzled(dtype, shape[-1]))

    return compat.kernel(
        moba_attend,
        out_type=(
            jax.ShapeDtypeStruct((num_pairs, head_dim), dtype),
            jax.ShapeDtypeStruct((num_pairs,), jnp.float32),
        ),
        grid=(num_tiles,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            matrices(WARPGROUPS, ROWS, head_dim),
            matrices(block_size, head_dim),
            matrices(block_size, head_dim),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )({"q": q, "row": row, "pair": pair, "k": k, "v": v, "head": head, "block": block})

"""The backward kernels: dK and dV over key tiles, dQ over query tiles; no atomics, so every run gives the same bits.

Both compute the probabilities anew from the saved log-sum-exp, `p = exp2(s * scale * log2(e) - lse * log2(e))`, and
`ds = p * (do v^T - delta)`, where `delta = rowsum(do * out) - dlse` comes from a small XLA prologue. The scale
multiplies the finished sums. Rows that saw nothing have lse = +inf here, so that p = 0.

`key_gradients`: one CTA owns 64 keys of one KV head per compute warpgroup and walks the query tiles that see them,
each for all query heads of the group, so the sum over the group happens in its accumulators. Tiles are transposed,
rows are keys: P^T and dS^T are then the left operands, in registers, of `dV += P^T dO` and `dK += dS^T Q`.

`query_gradients`: one CTA owns 64 queries of one head per compute warpgroup and walks key tiles: `dQ += dS K`.

In both, warpgroup 2 only issues the TMA copies of what is walked, into a ring of `stages` slots. P and dS are rounded
to the input dtype before their products; everything else is float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import compat
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.mosaic_sm90.operands import clean_slots, pad_tokens, prepare, some_query_sees_nothing
from pallas_kernels.attention.mosaic_sm90.parts import (
    COLUMN,
    COMPUTE_WARPGROUPS,
    LOG2E,
    ROW,
    WGMMA,
    Sight,
    accumulate,
    consume,
    count,
    opaque,
    read_runs,
    supply,
    tile_of_step,
)
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Mask

ROWS = 64  # of one compute warpgroup, keys or queries: two accumulators of more would not fit the registers
TILE = COMPUTE_WARPGROUPS * ROWS  # of one CTA


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """Tile sizes. They change speed only, never which pairs are visible.

    Attributes:
      block_q: queries of one tile of the walk of `key_gradients`.
      block_k: keys of one tile of the walk of `query_gradients`.
      q_stages: slots of the Q and dO rings of `key_gradients`.
      k_stages: slots of the K and V rings of `query_gradients`.
    """

    block_q: int = 64
    block_k: int = 64
    q_stages: int = 3
    k_stages: int = 3

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            value = getattr(self, name)
            if value not in (64, 128):
                raise ValueError(f"{name} must be 64 or 128; got {value}")
        for name in ("q_stages", "k_stages"):
            if (value := getattr(self, name)) < 2:
                raise ValueError(f"{name} must be at least 2; got {value}")

    def key_buffers(self, head_dim: int, dtype: Any) -> dict[str, Any]:
        """What `key_gradients` allocates per CTA, by name."""
        wide = compat.swizzled(dtype, head_dim)
        own = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, head_dim), dtype, transforms=wide)
        ring = plgpu.SMEM((self.q_stages, self.block_q, head_dim), dtype, transforms=wide)
        return {
            "k": own,  # and after the last tile dK
            "v": own,
            "q": ring,
            "do": ring,
            "stats": plgpu.SMEM((self.q_stages, 2, self.block_q), jnp.float32),
            "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
            # One for all three: a barrier's phase costs a register, and there is none to spare.
            "ready": plgpu.Barrier(num_arrivals=3, num_barriers=self.q_stages),
            "free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.q_stages),
        }

    def query_buffers(self, head_dim: int, dtype: Any) -> dict[str, Any]:
        """What `query_gradients` allocates per CTA, by name."""
        wide = compat.swizzled(dtype, head_dim)
        own = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, head_dim), dtype, transforms=wide)
        ring = plgpu.SMEM((self.k_stages, self.block_k, head_dim), dtype, transforms=wide)
        ready = plgpu.Barrier(num_barriers=self.k_stages)
        free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.k_stages)
        return {
            "q": own,  # and after the last tile dQ
            "do": own,
            "k": ring,
            "v": ring,
            "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
            "k_ready": ready,
            "v_ready": ready,
            "k_free": free,
            "v_free": free,
        }

    def smem_bytes(self, head_dim: int, dtype: Any) -> int:
        """Of the hungrier kernel."""
        kernels = (self.key_buffers(head_dim, dtype), self.query_buffers(head_dim, dtype))
        return max(compat.shared_memory_bytes(list(buffers.values())) for buffers in kernels)


def heuristic_backward_config(head_dim: int) -> BackwardConfig:
    """Tiles that compile without spills."""
    if head_dim <= 64:
        return BackwardConfig(block_q=128, block_k=128, q_stages=3, k_stages=3)
    return BackwardConfig(block_q=64, block_k=128, q_stages=3, k_stages=2)


def skip_backward_config(head_dim: int, tile: SkipTile) -> BackwardConfig:
    """Tiles for skipped tiles of 64 rows."""
    stages = 2 if tile.width == 128 and head_dim > 64 else 3
    return BackwardConfig(block_q=ROWS, block_k=tile.width, q_stages=3, k_stages=stages)


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    limits: Limits,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B N T"],
    *,
    keep: Bool[Array, "B N query_tiles key_tiles"] | None = None,
    mask: Mask,
    scale: float,
    config: BackwardConfig,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dQ, dK, dV from what the forward kernel saw and gave, and the cotangents of its two results.

    With `keep`, tiles of `ROWS` queries and `config.block_k` keys that it leaves out are neither loaded nor computed.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    clean = functools.partial(clean_slots, mask=mask, limits=limits, num_queries=num_queries, num_keys=num_keys)
    # A fusion of its own: together with the stacking below it would read its operands against their order in memory.
    delta = lax.optimization_barrier((d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1))
    delta = delta.swapaxes(1, 2) - d_lse
    if some_query_sees_nothing(mask, limits, num_queries, num_keys):
        # Their weights are 0, which does not stop a NaN; so they are zeroed by selection.
        blind = lse == -jnp.inf
        delta = jnp.where(blind, 0.0, delta)
        q, d_out = (jnp.where(blind.swapaxes(1, 2)[..., None], 0, x) for x in (q, d_out))
        lse = jnp.where(blind, jnp.inf, lse)
    # Whole tiles, since such copies are clipped at the end of the array only; rows past the end get p = 0.
    padding = ((0, 0), (0, 0), (0, -num_queries % TILE))
    stats = [jnp.pad(lse * LOG2E, padding, constant_values=jnp.inf), jnp.pad(delta, padding)]
    arrays = {
        "q": pad_tokens(q),
        "do": pad_tokens(d_out),
        "k": pad_tokens(clean(k)),
        "v": pad_tokens(clean(v)),
        "stats": jnp.stack(stats, axis=2),  # [B, N, 2, Tp]
    }
    if keep is not None:  # whole tiles of a CTA both ways
        missing = (-keep.shape[2] % COMPUTE_WARPGROUPS, -keep.shape[3] % (TILE // config.block_k))
        arrays["keep"] = jnp.pad(keep, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))).astype(jnp.int8)
    shape = _Shape(mask, num_queries, num_keys, scale, config)
    dk, dv = key_gradients(arrays, limits, shape, interpret)
    dq = query_gradients(arrays, limits, shape, interpret)
    return dq[:, :num_queries], clean(dk[:, :num_keys]), clean(dv[:, :num_keys])


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What both kernels must know at compile time beside the shapes of their arrays, which are padded."""

    mask: Mask
    num_queries: int
    num_keys: int
    scale: float
    config: BackwardConfig


def key_gradients(
    arrays: dict[str, Array], limits: Limits, shape: _Shape, interpret: plgpu.InterpretGPUParams | None
) -> tuple[Float[Array, "B Sp K H"], Float[Array, "B Sp K H"]]:
    """dK and dV."""
    batch, _, num_heads, head_dim = arrays["q"].shape
    num_kv_heads, dtype = arrays["k"].shape[2], arrays["k"].dtype
    group = num_heads // num_kv_heads
    block_q, stages = shape.config.block_q, shape.config.q_stages
    tile = (ROWS, block_q)  # rows are keys
    operands, runs = prepare(
        shape.mask, limits, shape.num_queries, shape.num_keys, tile_q=block_q, tile_k=TILE, by_key=True
    )
    buffers = shape.config.key_buffers(head_dim, dtype)
    last_q_tile, per_tile = -(-shape.num_queries // block_q) - 1, TILE // shape.config.block_k
    log2_scale = shape.scale * LOG2E
    i32 = jnp.int32

    def attention_dk_dv(refs, dk_ref, dv_ref, *scratch):
        smem = dict(zip(buffers, scratch, strict=True))
        warpgroup, b = lax.axis_index("warpgroup"), lax.axis_index("batch")
        kv_head = lax.axis_index("head")
        # Each role reads the table for itself: values kept across the branch would be spilled.
        read = functools.partial(read_runs, refs["runs"], b, lax.axis_index("line"), runs)

        def visit(i, visits):
            """Query tile and head of a step: all heads of the group in turn, tile by tile."""
            return tile_of_step(lax.div(i, i32(group)), visits), kv_head * group + lax.rem(i, i32(group))

        def flags_of(k_tile, visits):
            if "keep" not in arrays:
                return None

            def flags(i):
                q_tile, head = visit(i, visits)
                q_tile = jnp.minimum(q_tile, last_q_tile)  # a line without visits is read once too
                first = refs["keep"][b, head, q_tile, k_tile * per_tile].astype(i32)
                if per_tile == 1:
                    return first, first
                return first, refs["keep"][b, head, q_tile, k_tile * per_tile + 1].astype(i32)

            return flags

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            k_tile, full_runs, partial_runs = read()
            # Partial tiles first: what only they need holds no register afterwards.
            num_partial = count(partial_runs) * group
            num_steps = num_partial + count(full_runs) * group
            rows = pl.ds(k_tile * TILE + warpgroup * ROWS, ROWS)
            own = {name: smem[name].at[warpgroup] for name in ("k", "v")}
            for name, ref in own.items():
                plgpu.copy_gmem_to_smem(refs[name].at[b, rows, kv_head], ref, smem["own_ready"].at[warpgroup])
            sight = Sight(shape.mask, shape.num_queries, shape.num_keys, refs, b, tile, query_axis=1)

            def statistic(slot, which):
                x = plgpu.load(smem["stats"].at[slot, which], layout=COLUMN, optimized=False)
                return lax.broadcast_in_dim(x, tile, [1])

            def step(i, nth, carry, *, masked):
                dk, dv = carry
                slot = lax.rem(nth, i32(stages))
                plgpu.barrier_wait(smem["ready"].at[slot])

                at = opaque(warpgroup)

                def probabilities(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, smem["k"].at[at], smem["q"].at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, smem["v"].at[at], smem["do"].at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    if masked:
                        _, _, partial_runs = read()
                        q_tile, _ = visit(i, partial_runs)
                        s = jnp.where(sight.visible(q_tile * block_q, rows.start), s, -jnp.inf)
                    p = jnp.exp2(s * log2_scale - statistic(slot, 0))
                    return p, plgpu.wgmma_accumulator_load(dp_ref)

                accumulator = plgpu.ACC(tile, jnp.float32)
                p, dp = pl.run_scoped(probabilities, accumulator, accumulator)

                def ds():
                    return (p * (dp - statistic(slot, 1))).astype(dtype)

                dv, dk = accumulate(
                    [(dv, lambda: p.astype(dtype), smem["do"].at[slot]), (dk, ds, smem["q"].at[slot])],
                    interpreted=interpret is not None,
                )
                plgpu.barrier_arrive(smem["free"].at[slot])
                return dk, dv

            plgpu.barrier_wait(smem["own_ready"].at[warpgroup])
            zero = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            carry, loaded = (zero, zero), i32(0)

            def ignore(nth):
                slot = lax.rem(nth, i32(stages))
                plgpu.barrier_wait(smem["ready"].at[slot])
                plgpu.barrier_arrive(smem["free"].at[slot])

            skipping: dict[str, Any] = {
                "flags": flags_of(k_tile, partial_runs + full_runs),
                "warpgroup": warpgroup,
                "ignore": ignore,
            }
            if runs.num_partial:
                attend = functools.partial(step, masked=True)
                carry, loaded = consume(0, num_partial, attend, carry, loaded=loaded, **skipping)
            if runs.num_full:
                attend = functools.partial(step, masked=False)
                carry, loaded = consume(num_partial, num_steps, attend, carry, loaded=loaded, **skipping)
            dk, dv = carry
            own["k"][...] = (dk * shape.scale).astype(dtype)
            own["v"][...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own["k"], dk_ref.at[b, rows, kv_head])
            plgpu.copy_smem_to_gmem(own["v"], dv_ref.at[b, rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def load():
            plgpu.set_max_registers(24, action="decrease")
            k_tile, full_runs, partial_runs = read()
            visits = partial_runs + full_runs

            def fill(i, nth):
                slot = lax.rem(nth, i32(stages))

                @pl.when(nth >= stages)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])
                    plgpu.commit_smem()  # the statistics of this slot were read by ordinary loads

                q_tile, head = visit(i, visits)
                rows = pl.ds(q_tile * block_q, block_q)
                for name, source in (
                    ("q", (b, rows, head)),
                    ("stats", (b, head, slice(None), rows)),
                    ("do", (b, rows, head)),
                ):
                    plgpu.copy_gmem_to_smem(refs[name].at[source], smem[name].at[slot], smem["ready"].at[slot])

            loaded = supply(count(visits) * group, fill, flags=flags_of(k_tile, visits))

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(loaded - stages, 0), loaded)
            def drain(nth):
                plgpu.barrier_wait(smem["free"].at[lax.rem(nth, i32(stages))])

    return compat.kernel(
        attention_dk_dv,
        out_type=tuple(jax.ShapeDtypeStruct(arrays[name].shape, dtype) for name in ("k", "v")),
        grid=(batch, num_kv_heads, runs.table.shape[1]),
        grid_names=("batch", "head", "line"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )({**arrays, "runs": jnp.asarray(runs.table), **operands.arrays()})


def query_gradients(
    arrays: dict[str, Array], limits: Limits, shape: _Shape, interpret: plgpu.InterpretGPUParams | None
) -> Float[Array, "B Tp N H"]:
    """dQ."""
    batch, _, num_heads, head_dim = arrays["q"].shape
    num_kv_heads, dtype = arrays["k"].shape[2], arrays["k"].dtype
    group = num_heads // num_kv_heads
    block_k, stages = shape.config.block_k, shape.config.k_stages
    tile = (ROWS, block_k)
    operands, runs = prepare(shape.mask, limits, shape.num_queries, shape.num_keys, tile_q=TILE, tile_k=block_k)
    buffers = shape.config.query_buffers(head_dim, dtype)
    last_k_tile = -(-shape.num_keys // block_k) - 1
    log2_scale = shape.scale * LOG2E
    i32 = jnp.int32

    def attention_dq(refs, dq_ref, *scratch):
        smem = dict(zip(buffers, scratch, strict=True))
        warpgroup, b = lax.axis_index("warpgroup"), lax.axis_index("batch")
        head = lax.axis_index("head")
        q_tile, full_runs, partial_runs = read_runs(refs["runs"], b, lax.axis_index("line"), runs)
        visits = full_runs + partial_runs
        num_full = count(full_runs)
        num_steps = num_full + count(partial_runs)
        flags = None
        if "keep" in arrays:

            def flags(i):
                k_tile = jnp.minimum(tile_of_step(i, visits), last_k_tile)
                row_tile = q_tile * COMPUTE_WARPGROUPS
                first, second = (refs["keep"][b, head, row_tile + n, k_tile] for n in range(COMPUTE_WARPGROUPS))
                return first.astype(i32), second.astype(i32)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            row0 = q_tile * TILE + warpgroup * ROWS
            rows = pl.ds(row0, ROWS)
            own = {name: smem[name].at[warpgroup] for name in ("q", "do")}
            for name, ref in own.items():
                plgpu.copy_gmem_to_smem(refs[name].at[b, rows, head], ref, smem["own_ready"].at[warpgroup])
            sight = Sight(shape.mask, shape.num_queries, shape.num_keys, refs, b, tile)
            log2_sum_exp, delta = (
                plgpu.load(refs["stats"].at[b, head, which, rows], layout=ROW, optimized=False) for which in range(2)
            )

            def broadcast_rows(x):
                return lax.broadcast_in_dim(x, tile, [0])

            def step(i, nth, dq, *, masked):
                slot = lax.rem(nth, i32(stages))
                plgpu.barrier_wait(smem["k_ready"].at[slot])

                at = opaque(warpgroup)

                def score_gradients(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, smem["q"].at[at], smem["k"].at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(smem["v_ready"].at[slot])
                    plgpu.wgmma(dp_ref, smem["do"].at[at], smem["v"].at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    if masked:
                        k_tile = tile_of_step(i, visits)
                        s = jnp.where(sight.visible(row0, k_tile * block_k), s, -jnp.inf)
                    p = jnp.exp2(s * log2_scale - broadcast_rows(log2_sum_exp))
                    dp = plgpu.wgmma_accumulator_load(dp_ref)
                    return (p * (dp - broadcast_rows(delta))).astype(dtype)

                accumulator = plgpu.ACC(tile, jnp.float32)
                ds = pl.run_scoped(score_gradients, accumulator, accumulator)
                plgpu.barrier_arrive(smem["v_free"].at[slot])
                (dq,) = accumulate([(dq, lambda: ds, smem["k"].at[slot])], interpreted=interpret is not None)
                plgpu.barrier_arrive(smem["k_free"].at[slot])
                return dq

            plgpu.barrier_wait(smem["own_ready"].at[warpgroup])
            dq = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            loaded = i32(0)

            def ignore(nth):
                slot = lax.rem(nth, i32(stages))
                for name in ("k", "v"):
                    plgpu.barrier_wait(smem[f"{name}_ready"].at[slot])
                    plgpu.barrier_arrive(smem[f"{name}_free"].at[slot])

            skipping: dict[str, Any] = {"flags": flags, "warpgroup": warpgroup, "ignore": ignore}
            if runs.num_full:
                attend = functools.partial(step, masked=False)
                dq, loaded = consume(0, num_full, attend, dq, loaded=loaded, **skipping)
            if runs.num_partial:
                attend = functools.partial(step, masked=True)
                dq, loaded = consume(num_full, num_steps, attend, dq, loaded=loaded, **skipping)
            own["q"][...] = (dq * shape.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own["q"], dq_ref.at[b, rows, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def load():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, i32(group))

            def fill(i, nth):
                slot = lax.rem(nth, i32(stages))
                source = (b, pl.ds(tile_of_step(i, visits) * block_k, block_k), kv_head)
                for name in ("k", "v"):

                    @pl.when(nth >= stages)
                    def _(name=name):
                        plgpu.barrier_wait(smem[f"{name}_free"].at[slot])

                    plgpu.copy_gmem_to_smem(refs[name].at[source], smem[name].at[slot], smem[f"{name}_ready"].at[slot])

            loaded = supply(num_steps, fill, flags=flags)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(loaded - stages, 0), loaded)
            def drain(nth):
                slot = lax.rem(nth, i32(stages))
                plgpu.barrier_wait(smem["k_free"].at[slot])
                plgpu.barrier_wait(smem["v_free"].at[slot])

    return compat.kernel(
        attention_dq,
        out_type=jax.ShapeDtypeStruct(arrays["q"].shape, dtype),
        grid=(batch, num_heads, runs.table.shape[1]),
        grid_names=("batch", "head", "line"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )({**arrays, "runs": jnp.asarray(runs.table), **operands.arrays()})

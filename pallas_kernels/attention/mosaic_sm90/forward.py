"""The forward kernel: output and log-sum-exp, and with skipped tiles (`attention/skip.py`) which were kept.

One CTA owns `2 * block_q` query rows of one head. Warpgroups 0 and 1 compute, `block_q` rows each; warpgroup 2 only
issues the TMA copies of K and V into a ring of `stages` slots. The compute warpgroups take turns on the tensor core:
while one multiplies, the other does its softmax.

Scores live in the base-2 domain: `m` is the running row maximum times `scale * log2(e)`, so one score costs one fused
multiply-add and one `ex2`. The log-sum-exp that leaves the kernel is natural. P is rounded to the input dtype before
P @ V; everything else is float32.

Skipping is compiled in only where asked for. The tile of one compute warpgroup is then the tile of the rule: its rows
vote on each tile of scores, and a skipped one costs Q @ K^T and the vote, but no exponential and no P @ V. Its V is
loaded and waited for all the same, and every barrier is passed on both branches.
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
from pallas_kernels.attention.mosaic_sm90.operands import clean_slots, pad_tokens, prepare
from pallas_kernels.attention.mosaic_sm90.parts import (
    COMPUTE_WARPGROUPS,
    LOG2E,
    ROW,
    WGMMA,
    Sight,
    accumulate,
    count,
    read_runs,
    tile_of_step,
)
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Mask
from pallas_kernels.votes import any_of_early


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes. They change speed only, never which pairs are visible.

    Attributes:
      block_q: query rows of one compute warpgroup; a CTA has two.
      block_k: keys of one tile.
      stages: slots of the K and V rings.
    """

    block_q: int = 64
    block_k: int = 128
    stages: int = 2

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            value = getattr(self, name)
            if value < 64 or value % 64:
                raise ValueError(f"{name} must be a positive multiple of 64; got {value}")
        if self.block_k > 256:
            raise ValueError(f"block_k must be at most 256, the widest wgmma and TMA box; got {self.block_k}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")

    @property
    def tile_q(self) -> int:
        return COMPUTE_WARPGROUPS * self.block_q

    def buffers(self, head_dim: int, value_dim: int, dtype: Any) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""

        def matrices(*shape):
            return plgpu.SMEM(shape, dtype, transforms=compat.swizzled(dtype, shape[-1]))

        q = matrices(COMPUTE_WARPGROUPS, self.block_q, head_dim)
        if value_dim == head_dim:
            q_and_out = q  # Q, and after the last tile the output
        else:
            # The same memory twice. A warpgroup finishes while the other still reads its Q, so the output has as many
            # bytes per warpgroup: more rows than are used.
            q_and_out = plgpu.RefUnion(q, matrices(COMPUTE_WARPGROUPS, self.block_q * head_dim // value_dim, value_dim))
        ready = plgpu.Barrier(num_barriers=self.stages)
        free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.stages)
        return {
            "q_and_out": q_and_out,
            "lse": plgpu.SMEM((COMPUTE_WARPGROUPS, self.block_q), jnp.float32),
            "k": matrices(self.stages, self.block_k, head_dim),
            "v": matrices(self.stages, self.block_k, value_dim),
            "q_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            "k_ready": ready,
            "v_ready": ready,
            "k_free": free,
            "v_free": free,
            "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        }

    def smem_bytes(self, head_dim: int, dtype: Any, value_dim: int | None = None) -> int:
        value_dim = head_dim if value_dim is None else value_dim
        return compat.shared_memory_bytes(list(self.buffers(head_dim, value_dim, dtype).values()))


def skip_config(head_dim: int, tile: SkipTile) -> Config | None:
    """Tiles for skipping, which are part of the call's meaning; None where there are none."""
    if (tile.rows, tile.width) == (64, 64):
        return Config(block_q=64, block_k=64, stages=4 if head_dim <= 128 else 2)
    if (tile.rows, tile.width) == (64, 128) and head_dim <= 192:
        return heuristic_config(head_dim)
    return None


def heuristic_config(head_dim: int) -> Config:
    """Tiles that compile without spills."""
    if head_dim <= 64:
        return Config(block_q=64, block_k=128, stages=4)
    if head_dim <= 192:
        return Config(block_q=64, block_k=128, stages=2)
    return Config(block_q=64, block_k=64, stages=2)


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    limits: Limits,
    *,
    mask: Mask,
    scale: float,
    config: Config,
    log_threshold: Float[Array, "B"] | None = None,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"], Bool[Array, "B N query_tiles key_tiles"] | None]:
    """Output and natural log-sum-exp, and with a threshold the kept tiles of `block_q` rows and `block_k` keys."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    value_dim = v.shape[3]
    group = num_heads // num_kv_heads
    dtype = q.dtype
    block_q, block_k, stages = config.block_q, config.block_k, config.stages
    skips = log_threshold is not None
    v = clean_slots(v, mask, limits, num_queries, num_keys)  # K needs nothing, its scores are selected away
    operands, runs = prepare(mask, limits, num_queries, num_keys, tile_q=config.tile_q, tile_k=block_k, ascending=skips)
    num_q_tiles = runs.table.shape[1]
    buffers = config.buffers(head_dim, value_dim, dtype)
    if skips:
        buffers["kept"] = plgpu.SMEM((COMPUTE_WARPGROUPS,), jnp.int32)  # the last step whose tile was kept
    tile = (block_q, block_k)
    log2_scale = scale * LOG2E
    i32 = jnp.int32

    num_k_tiles = -(-num_keys // block_k)

    def attention_forward(refs, results, *scratch):
        smem = dict(zip(buffers, scratch, strict=True))
        warpgroup, b = lax.axis_index("warpgroup"), lax.axis_index("batch")
        head = lax.axis_index("head")
        q_tile, full_runs, partial_runs = read_runs(refs["runs"], b, lax.axis_index("line"), runs)
        num_full = count(full_runs)
        num_steps = num_full + count(partial_runs)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            row0 = q_tile * config.tile_q + warpgroup * block_q
            rows = pl.ds(row0, block_q)
            q_smem, out_smem = smem["q_and_out"] if value_dim != head_dim else (smem["q_and_out"],) * 2
            q_smem, out_smem = q_smem.at[warpgroup], out_smem.at[warpgroup]
            if value_dim != head_dim:
                out_smem = out_smem.at[pl.ds(0, block_q)]
            turn = smem["turn"]
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, head], q_smem, smem["q_ready"].at[warpgroup])
            sight = Sight(mask, num_queries, num_keys, refs, b, tile)

            def broadcast_rows(x, shape=tile):
                return lax.broadcast_in_dim(x, shape, [0])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def hand_over(i, slot):
                """From the softmax of one warpgroup to that of the other, with V there."""
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                plgpu.barrier_wait(turn)

            def wait_for_next_k(i):
                following = i + 1

                @pl.when(following < num_steps)
                def _():
                    plgpu.barrier_wait(smem["k_ready"].at[lax.rem(following, i32(stages))])

            def vote(i, k_tile, top, m):
                """Whether the tile is kept; the rule of `skip.py`, in base 2."""
                # A row that has seen nothing has an infinite margin to what it sees first.
                abstains = (top - m < log2_threshold) | (top == -jnp.inf)
                if num_queries % block_q:
                    index = plgpu.broadcasted_iota(i32, (block_q,), 0, layout=ROW) + row0
                    abstains |= index >= num_queries
                votes = jnp.where(abstains, 0, 1)
                keep = any_of_early(votes, warpgroup, i, smem["kept"], layout=ROW, interpreted=interpret is not None)
                results["keep"][b, head, row_tile, k_tile] = keep.astype(jnp.int8)
                return keep

            def step(i, carry, *, masked):
                slot = lax.rem(i, i32(stages))

                def multiply_qk(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem, smem["k"].at[slot].transpose((1, 0)))
                    take_turns()
                    return acc_ref[...]

                s = pl.run_scoped(multiply_qk, plgpu.ACC(tile, jnp.float32))
                plgpu.barrier_arrive(smem["k_free"].at[slot])
                if masked:
                    k_tile = tile_of_step(i - num_full, partial_runs)
                    s = jnp.where(sight.visible(row0, k_tile * block_k), s, -jnp.inf)
                elif skips:
                    k_tile = tile_of_step(i, full_runs)
                top = s.max(axis=1) * log2_scale

                def attend(carry):
                    acc, m, total = carry
                    m_new = jnp.maximum(m, top)
                    # A row that has seen no key yet would compute -inf + inf.
                    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                    alpha = jnp.exp2(m - m_safe)
                    p = jnp.exp2(s * log2_scale - broadcast_rows(m_safe))
                    acc = acc * broadcast_rows(alpha, acc.shape)
                    total = total * alpha + p.sum(axis=1)
                    p = p.astype(dtype)
                    # Keeps the compiler from moving softmax work past the hand-over of the tensor core.
                    acc, total, m_new, p = lax.optimization_barrier((acc, total, m_new, p))
                    hand_over(i, slot)
                    (acc,) = accumulate(
                        [(acc, lambda: p, smem["v"].at[slot])],
                        interpreted=interpret is not None,
                        meanwhile=lambda: wait_for_next_k(i),
                    )
                    return acc, m_new, total

                def leave_out(carry):
                    hand_over(i, slot)
                    wait_for_next_k(i)
                    return carry

                if skips:
                    carry = lax.cond(vote(i, k_tile, top, carry[1]), attend, leave_out, carry)
                else:
                    carry = attend(carry)
                plgpu.barrier_arrive(smem["v_free"].at[slot])
                return carry

            if skips:
                log2_threshold = refs["log2_threshold"][b]
                smem["kept"][warpgroup] = i32(-1)
                plgpu.commit_smem()
                row_tile = q_tile * COMPUTE_WARPGROUPS + warpgroup

                @pl.loop(0, num_k_tiles)
                def nothing_kept_yet(k_tile):
                    results["keep"][b, head, row_tile, k_tile] = jnp.int8(0)

            plgpu.barrier_wait(smem["q_ready"].at[warpgroup])

            @pl.when(num_steps > 0)
            def _():
                plgpu.barrier_wait(smem["k_ready"].at[0])

            pl.when(warpgroup == 1)(take_turns)  # half a step behind warpgroup 0
            carry = (
                plgpu.layout_cast(jnp.zeros((block_q, value_dim), jnp.float32), WGMMA),
                plgpu.layout_cast(jnp.full((block_q,), -jnp.inf, jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((block_q,), jnp.float32), ROW),
            )
            if runs.num_full:
                carry = lax.fori_loop(0, num_full, functools.partial(step, masked=False), carry)
            if runs.num_partial:
                carry = lax.fori_loop(num_full, num_steps, functools.partial(step, masked=True), carry)
            pl.when(warpgroup == 0)(take_turns)

            acc, m, total = carry
            empty = total == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
            out_smem[...] = (acc * broadcast_rows(inverse, acc.shape)).astype(dtype)
            smem["lse"][warpgroup] = jnp.where(empty, -jnp.inf, (m + jnp.log2(total)) * (1.0 / LOG2E))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, results["out"].at[b, rows, head])
            plgpu.copy_smem_to_gmem(smem["lse"].at[warpgroup], results["lse"].at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def load():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, i32(group))

            @pl.loop(0, num_steps)
            def fill(i):
                slot = lax.rem(i, i32(stages))
                source = (b, pl.ds(tile_of_step(i, full_runs + partial_runs) * block_k, block_k), kv_head)
                for name in ("k", "v"):

                    @pl.when(i >= stages)
                    def _(name=name):
                        plgpu.barrier_wait(smem[f"{name}_free"].at[slot])

                    plgpu.copy_gmem_to_smem(refs[name].at[source], smem[name].at[slot], smem[f"{name}_ready"].at[slot])

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def drain(i):
                slot = lax.rem(i, i32(stages))
                plgpu.barrier_wait(smem["k_free"].at[slot])
                plgpu.barrier_wait(smem["v_free"].at[slot])

    q_padded = pad_tokens(q)
    inputs = {
        "q": q_padded,
        "k": pad_tokens(k),
        "v": pad_tokens(v),
        "runs": jnp.asarray(runs.table),
        **operands.arrays(),
    }
    # Whole tiles: a copy without swizzle to contiguous memory becomes a plain bulk copy, which, unlike the TMA of the
    # other arrays, is clipped at the end of the array and not at the end of a row.
    lse_length = num_q_tiles * config.tile_q
    out_type = {
        "out": jax.ShapeDtypeStruct((*q_padded.shape[:3], value_dim), dtype),
        "lse": jax.ShapeDtypeStruct((batch, num_heads, lse_length), jnp.float32),
    }
    if log_threshold is not None:
        inputs["log2_threshold"] = log_threshold * LOG2E
        row_tiles = num_q_tiles * COMPUTE_WARPGROUPS
        out_type["keep"] = jax.ShapeDtypeStruct((batch, num_heads, row_tiles, num_k_tiles), jnp.int8)
    results = compat.kernel(
        attention_forward,
        out_type=out_type,
        # The last axis varies fastest: CTAs that run at the same time share one head's K and V in the L2 cache.
        grid=(batch, num_heads, num_q_tiles),
        grid_names=("batch", "head", "line"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(inputs)
    keep = results["keep"][:, :, : -(-num_queries // block_q)] != 0 if skips else None
    return results["out"][:, :num_queries], results["lse"][:, :, :num_queries], keep

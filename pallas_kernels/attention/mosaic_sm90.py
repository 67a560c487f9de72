"""Hopper kernel of `flash_attention`: warp-specialised TMA and wgmma over the live tiles of any structured mask.

One CTA owns `2 * block_q` query rows of one head. Warpgroups 0 and 1 compute, `block_q` rows each; warpgroup 2 only
issues the TMA copies of K and V into a ring of `stages` slots. The compute warpgroups take turns on the tensor core:
while one multiplies, the other does its softmax.

The tiles a CTA visits come from a table of runs (`tile_runs`): first the full ones, with no masking arithmetic, then
the partial ones, where each row compares the key index with the row's one or two intervals of visible keys
(`Mask.key_intervals`). Run-time limits (segments, positions, lengths) shorten the runs before the launch.

Scores live in the base-2 domain: `m` is the running row maximum times `scale * log2(e)`, so one score costs one fused
multiply-add and one `ex2`. The log-sum-exp that leaves the kernel is natural. P is rounded to the input dtype before
P @ V; everything else is float32.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, masks
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip
from pallas_kernels.masks import Mask
from pallas_kernels.tile_runs import TileRuns, all_runs, limit_runs, mask_runs, tile_limits

LOG2E = math.log2(math.e)
COMPUTE_WARPGROUPS = 2
HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
FAR = 2**30  # beyond every index and position

WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)


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

    def buffers(self, head_dim: int, dtype: Any) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        wide = compat.swizzled(dtype, head_dim)
        ring = plgpu.SMEM((self.stages, self.block_k, head_dim), dtype, transforms=wide)
        ready = plgpu.Barrier(num_barriers=self.stages)
        free = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=self.stages)
        return {
            # Q, and after the last tile the output.
            "qo": plgpu.SMEM((COMPUTE_WARPGROUPS, self.block_q, head_dim), dtype, transforms=wide),
            "lse": plgpu.SMEM((COMPUTE_WARPGROUPS, self.block_q), jnp.float32),
            "k": ring,
            "v": ring,
            "q_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            "k_ready": ready,
            "v_ready": ready,
            "k_free": free,
            "v_free": free,
            "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        }

    def smem_bytes(self, head_dim: int, dtype: Any) -> int:
        return compat.shared_memory_bytes(list(self.buffers(head_dim, dtype).values()))


def heuristic_config(head_dim: int) -> Config:
    """Tiles that compile without spills."""
    if head_dim <= 64:
        return Config(block_q=64, block_k=128, stages=4)
    if head_dim <= 128:
        return Config(block_q=64, block_k=128, stages=2)
    return Config(block_q=64, block_k=64, stages=2)


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Masks, limits and lengths are all supported."""
    if skip is not None:
        return "the Hopper kernel skips no tiles yet; leave out skip_threshold and skip_scale_factor"
    if str(q.dtype) not in DTYPES:
        return f"needs bfloat16 or float16; got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"needs head_dim in {HEAD_DIMS}; got {q.shape[3]}"
    if v.shape[3] != q.shape[3]:
        return f"needs values of the head dim of the keys; got {v.shape[3]} and {k.shape[3]}"
    return compat.missing_hopper()


def _pad_to(array: Array, multiple: int) -> Array:
    """Pads the last axis with its last value up to a multiple."""
    missing = -array.shape[-1] % multiple
    return jnp.pad(array, ((0, 0), (0, missing)), mode="edge") if missing else array


def _pad_tokens(array: Array) -> Array:
    """Pads `[B, length, heads, H]` with zeros to a multiple of 8 tokens, the rows of one swizzle atom."""
    missing = -array.shape[1] % 8
    return jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array


def _extremes(array: Array, tile: int) -> tuple[Array, Array]:
    """Minimum and maximum of each tile of the (padded) last axis."""
    tiled = array.reshape(array.shape[0], -1, tile)
    return tiled.min(axis=-1), tiled.max(axis=-1)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """A call made ready for the kernels: cleaned limits, padded to whole tiles.

    Negative segments are -1 for keys and -2 for queries, so that they equal nothing.
    """

    q_segments: Int[Array, "B Tp"] | None
    k_segments: Int[Array, "B Sp"] | None
    q_positions: Int[Array, "B Tp"] | None
    k_positions: Int[Array, "B Sp"] | None
    kv_lengths: Int[Array, "B"] | None
    empty: Array | None  # bool [#B, S]: key slots that no query sees


def _operands(mask: Mask, limits: Limits, num_queries: int, num_keys: int, config: Config) -> _Operands:
    q_segments, k_segments, q_positions, k_positions, kv_lengths = limits
    index = jnp.arange(num_keys, dtype=jnp.int32)[None]
    empty = None

    def also_empty(flags):
        return flags if empty is None else empty | flags

    if kv_lengths is not None:
        empty = also_empty(index >= kv_lengths[:, None])
    if q_segments is not None and k_segments is not None:
        empty = also_empty(k_segments < 0)
        q_segments = _pad_to(jnp.where(q_segments < 0, -2, q_segments), config.tile_q)
        k_segments = _pad_to(jnp.where(k_segments < 0, -1, k_segments), config.block_k)
    if q_positions is not None or k_positions is not None:
        batch = (k_positions if q_positions is None else q_positions).shape[0]  # type: ignore[union-attr]
        if q_positions is None:
            q_index = jnp.arange(num_queries, dtype=jnp.int32) + mask.query_offset(num_queries, num_keys)
            q_positions = jnp.broadcast_to(q_index[None], (batch, num_queries))
        if k_positions is None:
            k_positions = jnp.broadcast_to(index, (batch, num_keys))
        else:
            empty = also_empty(k_positions < 0)
        if kv_lengths is not None:
            k_positions = jnp.where(index < kv_lengths[:, None], k_positions, -1)
        q_positions = _pad_to(q_positions, config.tile_q)
        # Slots past the end must stay unseen, so they cannot repeat the last position.
        missing = -num_keys % config.block_k
        k_positions = jnp.pad(k_positions, ((0, 0), (0, missing)), constant_values=-1)
    elif (unseen := _unseen_keys(mask, num_queries, num_keys)).any():
        empty = also_empty(jnp.asarray(unseen)[None])
    return _Operands(q_segments, k_segments, q_positions, k_positions, kv_lengths, empty)


@functools.lru_cache(maxsize=256)
def _unseen_keys(mask: Mask, num_queries: int, num_keys: int) -> np.ndarray:
    """Bool `[S]`: keys that the mask shows to no query (a window over more keys than queries has some)."""
    edges = np.zeros(num_keys + 1, np.int64)
    q_index = np.arange(num_queries) + mask.query_offset(num_queries, num_keys)
    for start, stop in mask.key_intervals(q_index, num_keys):
        start, stop = np.clip(start, 0, num_keys), np.clip(stop, 0, num_keys)
        nonempty = start < stop
        np.add.at(edges, start[nonempty], 1)
        np.add.at(edges, stop[nonempty], -1)
    return np.cumsum(edges)[:-1] == 0


def _runs(mask: Mask, ops: _Operands, num_queries: int, num_keys: int, config: Config) -> TileRuns:
    """The tiles to visit, after all limits."""
    num_q_tiles, num_k_tiles = -(-num_queries // config.tile_q), -(-num_keys // config.block_k)
    live = full = None  # [B or 1, query tiles, key tiles]

    def both(flags, more):
        return more if flags is None else flags & more

    if ops.q_positions is None or ops.k_positions is None:
        runs = mask_runs(mask, num_queries, num_keys, config.tile_q, config.block_k)
        if ops.kv_lengths is not None:
            end = (ops.kv_lengths[:, None] - jnp.arange(num_k_tiles) * config.block_k)[:, None]
            live, full = end > 0, end >= config.block_k
    else:
        runs = all_runs(num_q_tiles, num_k_tiles)
        k_min, k_max = (x[:, None] for x in _extremes(ops.k_positions, config.block_k))
        live = jnp.zeros((1, 1, 1), bool)
        for start, stop in mask.key_intervals(ops.q_positions, FAR):
            first, _ = _extremes(start, config.tile_q)
            _, last = _extremes(stop, config.tile_q)
            live |= (first[:, :, None] <= k_max) & (last[:, :, None] > k_min)
        live &= k_max >= 0
        full = jnp.zeros_like(live)
    if ops.q_segments is not None and ops.k_segments is not None:
        q_min, q_max = (x[:, :, None] for x in _extremes(ops.q_segments, config.tile_q))
        k_min, k_max = (x[:, None] for x in _extremes(ops.k_segments, config.block_k))
        live = both(live, (q_min <= k_max) & (k_min <= q_max))
        full = both(full, (q_min == q_max) & (k_min == k_max) & (q_min == k_min))
    if live is None or full is None:
        return runs
    shape = (live.shape[0], num_q_tiles, num_k_tiles)
    return limit_runs(runs, tile_limits(jnp.broadcast_to(live, shape), jnp.broadcast_to(full, shape)))


def _read_runs(table_ref: Any, line: tuple[Any, Any], columns: range) -> list[tuple[Any, Any]]:
    return [(table_ref[*line, c], table_ref[*line, c + 1]) for c in columns[::2]]


def _tile_of_step(step: Any, runs: list[tuple[Any, Any]]) -> Any:
    """Index of the tile that is the `step`-th of the runs put end to end."""
    tile, begin = jnp.int32(0), jnp.int32(0)
    for start, length in runs:
        # An empty run begins where its successor begins, which overrides it.
        tile = jnp.where(step >= begin, step - begin + start, tile)
        begin = begin + length
    return tile


def _accumulate(acc: Array, p: Array, v_smem: Any, *, interpreted: bool, meanwhile: Any) -> Array:
    """`acc + p @ v` with p in registers; `meanwhile` runs while the tensor core works.

    The interpreter knows neither a left operand in registers nor an accumulator that does not start at zero; this
    is the one operation that it runs as something else.
    """
    if interpreted:
        acc = acc + jnp.dot(p.astype(jnp.float32), v_smem[...].astype(jnp.float32))
        plgpu.commit_smem()  # an ordinary read, unlike that of wgmma, must be fenced against the refill by TMA
        meanwhile()
        return acc

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, p, v_smem)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    limits: Limits,
    scale: float,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and log-sum-exp; see `flash_attention`. `interpret` runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: on differentiation.
      ValueError: `config` needs more shared memory than a CTA has.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    dtype = q.dtype
    config = heuristic_config(head_dim) if config is None else config
    if (needed := config.smem_bytes(head_dim, dtype)) > compat.SHARED_MEMORY_BYTES:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory at head_dim {head_dim}; "
            f"a CTA has {compat.SHARED_MEMORY_BYTES}"
        )
    if batch == 0:
        return jnp.zeros(q.shape, dtype), jnp.zeros((0, num_heads, num_queries), jnp.float32)
    q, k, v = _refuse_gradients(q, k, v)
    ops = _operands(mask, limits, num_queries, num_keys, config)
    if ops.empty is not None:
        # A weight of 0 does not stop a NaN in an empty slot of V; K needs nothing, its scores are selected away.
        v = jnp.where(ops.empty[:, :, None, None], 0, v)
    runs = _runs(mask, ops, num_queries, num_keys, config)
    return _forward(q, k, v, ops, runs, mask=mask, scale=scale, config=config, interpret=interpret)


@jax.custom_jvp
def _refuse_gradients(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, k, v


@_refuse_gradients.defjvp
def _refuse_gradients_jvp(primals, tangents):
    raise NotImplementedError(
        'flash_attention "mosaic" computes no gradients: its backward kernels do not exist yet; '
        'use implementation="xla" where a gradient is taken'
    )


def _forward(q, k, v, ops: _Operands, runs: TileRuns, *, mask, scale, config: Config, interpret):
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    dtype = q.dtype
    block_q, block_k, stages = config.block_q, config.block_k, config.stages
    num_q_tiles = runs.table.shape[1]
    tile = (block_q, block_k)
    offset = mask.query_offset(num_queries, num_keys)
    full_columns = range(1, 1 + 2 * runs.num_full)
    partial_columns = range(full_columns.stop, full_columns.stop + 2 * runs.num_partial)
    table_by_batch = runs.table.shape[0] > 1
    log2_scale = scale * LOG2E
    i32 = jnp.int32

    def kernel(refs, out_ref, lse_ref, smem):
        warpgroup, b = lax.axis_index("warpgroup"), lax.axis_index("batch")
        head = lax.axis_index("head")
        line = (b if table_by_batch else 0, lax.axis_index("line"))
        q_tile = refs["runs"][*line, 0]
        full_runs = _read_runs(refs["runs"], line, full_columns)
        partial_runs = _read_runs(refs["runs"], line, partial_columns)
        num_full = sum((length for _, length in full_runs), i32(0))
        num_steps = sum((length for _, length in partial_runs), num_full)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            row0 = q_tile * config.tile_q + warpgroup * block_q
            rows = pl.ds(row0, block_q)
            qo, turn = smem["qo"].at[warpgroup], smem["turn"]
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, head], qo, smem["q_ready"].at[warpgroup])

            def load_rows(ref):
                return plgpu.load(ref.at[b, rows], layout=ROW, optimized=False)

            def broadcast_rows(x, shape=tile):
                return lax.broadcast_in_dim(x, shape, [0])

            def columns_of(ref, k_tile):
                x = plgpu.load(ref.at[b, pl.ds(k_tile * block_k, block_k)], layout=COLUMN, optimized=False)
                return lax.broadcast_in_dim(x, tile, [1])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def visible(k_tile):
                """Which pairs of a partial tile may attend."""
                if refs["q_positions"] is None:
                    index = plgpu.broadcasted_iota(i32, (block_q,), 0, layout=ROW) + (row0 + offset)
                    end = num_keys if refs["kv_lengths"] is None else refs["kv_lengths"][b]
                    intervals, first = mask.key_intervals(index, num_keys), k_tile * block_k
                    keys = plgpu.broadcasted_iota(i32, tile, 1, layout=WGMMA)
                else:
                    index, end = load_rows(refs["q_positions"]), FAR
                    intervals, first = mask.key_intervals(index, FAR), 0
                    keys = columns_of(refs["k_positions"], k_tile)
                keep = None
                for start, stop in intervals:
                    # Ends that are the same for all rows would leave the compiler without a layout to infer; the
                    # bounds FAR away change nothing and tie them to the rows.
                    start = jnp.maximum(jnp.maximum(start, 0), index - FAR) - first
                    stop = jnp.minimum(jnp.minimum(stop, end), index + FAR) - first
                    inside = (keys >= broadcast_rows(start)) & (keys < broadcast_rows(stop))
                    keep = inside if keep is None else keep | inside
                if refs["q_segments"] is not None:
                    same = broadcast_rows(load_rows(refs["q_segments"])) == columns_of(refs["k_segments"], k_tile)
                    keep = same if keep is None else keep & same
                return keep

            def step(i, carry, *, masked):
                acc, m, total = carry
                slot = lax.rem(i, i32(stages))

                def multiply_qk(acc_ref):
                    plgpu.wgmma(acc_ref, qo, smem["k"].at[slot].transpose((1, 0)))
                    take_turns()
                    return acc_ref[...]

                s = pl.run_scoped(multiply_qk, plgpu.ACC(tile, jnp.float32))
                plgpu.barrier_arrive(smem["k_free"].at[slot])
                if masked:
                    s = jnp.where(visible(_tile_of_step(i - num_full, partial_runs)), s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * log2_scale)
                # A row that has seen no key yet would compute -inf + inf.
                m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - m_safe)
                p = jnp.exp2(s * log2_scale - broadcast_rows(m_safe))
                acc = acc * broadcast_rows(alpha, acc.shape)
                total = total * alpha + p.sum(axis=1)
                p = p.astype(dtype)
                # Keeps the compiler from moving softmax work past the hand-over of the tensor core.
                acc, total, m_new, p = lax.optimization_barrier((acc, total, m_new, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                plgpu.barrier_wait(turn)

                def wait_for_next_k():
                    following = i + 1

                    @pl.when(following < num_steps)
                    def _():
                        plgpu.barrier_wait(smem["k_ready"].at[lax.rem(following, i32(stages))])

                acc = _accumulate(
                    acc, p, smem["v"].at[slot], interpreted=interpret is not None, meanwhile=wait_for_next_k
                )
                plgpu.barrier_arrive(smem["v_free"].at[slot])
                return acc, m_new, total

            plgpu.barrier_wait(smem["q_ready"].at[warpgroup])

            @pl.when(num_steps > 0)
            def _():
                plgpu.barrier_wait(smem["k_ready"].at[0])

            pl.when(warpgroup == 1)(take_turns)  # half a step behind warpgroup 0
            carry = (
                plgpu.layout_cast(jnp.zeros((block_q, head_dim), jnp.float32), WGMMA),
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
            qo[...] = (acc * broadcast_rows(inverse, acc.shape)).astype(dtype)
            smem["lse"][warpgroup] = jnp.where(empty, -jnp.inf, (m + jnp.log2(total)) * (1.0 / LOG2E))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(qo, out_ref.at[b, rows, head])
            plgpu.copy_smem_to_gmem(smem["lse"].at[warpgroup], lse_ref.at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def load():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, i32(group))

            @pl.loop(0, num_steps)
            def _(i):
                slot = lax.rem(i, i32(stages))
                source = (b, pl.ds(_tile_of_step(i, full_runs + partial_runs) * block_k, block_k), kv_head)
                for name in ("k", "v"):

                    @pl.when(i >= stages)
                    def _(name=name):
                        plgpu.barrier_wait(smem[f"{name}_free"].at[slot])

                    plgpu.copy_gmem_to_smem(refs[name].at[source], smem[name].at[slot], smem[f"{name}_ready"].at[slot])

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _(i):
                slot = lax.rem(i, i32(stages))
                plgpu.barrier_wait(smem["k_free"].at[slot])
                plgpu.barrier_wait(smem["v_free"].at[slot])

    q_padded = _pad_tokens(q)
    inputs = {
        "q": q_padded,
        "k": _pad_tokens(k),
        "v": _pad_tokens(v),
        "runs": jnp.asarray(runs.table),
        "q_segments": ops.q_segments,
        "k_segments": ops.k_segments,
        "q_positions": ops.q_positions,
        "k_positions": ops.k_positions,
        "kv_lengths": ops.kv_lengths,
    }
    buffers = config.buffers(head_dim, dtype)
    # Whole tiles: a copy without swizzle to contiguous memory becomes a plain bulk copy, which, unlike the TMA of the
    # other arrays, is clipped at the end of the array and not at the end of a row.
    lse_length = num_q_tiles * config.tile_q
    out, lse = compat.kernel(
        lambda refs, out_ref, lse_ref, *scratch: kernel(
            refs, out_ref, lse_ref, dict(zip(buffers, scratch, strict=True))
        ),
        out_type=(
            jax.ShapeDtypeStruct(q_padded.shape, dtype),
            jax.ShapeDtypeStruct((batch, num_heads, lse_length), jnp.float32),
        ),
        # The last axis varies fastest: CTAs that run at the same time share one head's K and V in the L2 cache.
        grid=(batch, num_heads, num_q_tiles),
        grid_names=("batch", "head", "line"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(inputs)
    return out[:, :num_queries], lse[:, :, :num_queries]


def compile_cases():
    """What the compile gate compiles: each shipped configuration, and each form of masking at least once."""
    from pallas_kernels.compile_gate import CompileCase

    length = 8192
    causal = masks.Causal()
    forms: list[tuple[str, Mask, tuple[str, ...]]] = [
        ("causal", causal, ()),
        ("full", masks.Full(), ()),
        ("doubled", masks.BlockDiffusion(length // 2, 64), ()),
        ("window", masks.SlidingWindow(1024, 4), ()),
        ("segments", causal, ("q_segments", "k_segments")),
        ("positions", causal, ("q_positions", "k_positions")),
        ("lengths", masks.Full(), ("kv_lengths",)),
    ]
    shipped = [(head_dim, jnp.bfloat16, "causal", None) for head_dim in HEAD_DIMS]
    shipped += [(128, jnp.bfloat16, name, None) for name, _, _ in forms[1:]]
    shipped += [(64, jnp.float16, "doubled", None)]
    explored = [
        (64, jnp.bfloat16, "full", Config(block_q=128, block_k=128, stages=3)),
        (64, jnp.bfloat16, "causal", Config(block_q=64, block_k=256, stages=3)),
        (128, jnp.bfloat16, "causal", Config(block_q=64, block_k=64, stages=3)),
        (128, jnp.bfloat16, "doubled", Config(block_q=64, block_k=64, stages=4)),
    ]
    for head_dim, dtype, form, config in shipped + explored:
        _, mask, limited = next(entry for entry in forms if entry[0] == form)

        def call(q, k, v, *rest, mask=mask, limited=limited, config=config):
            limits = Limits(**dict(zip(limited, rest, strict=True)))
            return run(q, k, v, mask=mask, limits=limits, scale=q.shape[-1] ** -0.5, config=config)

        def array(*shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, dtype)

        per_row = [array(*((2,) if name == "kv_lengths" else (2, length)), dtype=jnp.int32) for name in limited]
        tiles = config or heuristic_config(head_dim)
        yield CompileCase(
            name=f"attention forward {form} {jnp.dtype(dtype).name} H={head_dim} "
            f"{tiles.block_q}x{tiles.block_k} stages={tiles.stages}",
            function=call,
            avals=(array(2, length, 16, head_dim), *[array(2, length, 4, head_dim)] * 2, *per_row),
            shipped=config is None,
            max_spill=0 if config is None else 256,
            reason="" if config is None else "exploratory",
        )

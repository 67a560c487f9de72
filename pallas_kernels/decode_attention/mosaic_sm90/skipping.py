"""The kernel that leaves out tiles (`attention/skip.py`): V of a tile is fetched when its scores have been voted on.

Rows are packed as in `dense.py`. A decision depends on all earlier tiles of its chain, so the unit of work is a chain
of one row of the batch and one key head: a work item is a range of the chains of a row, and one CTA walks them one
after the other, each from its first tile to its last.

With up to 64 rows the two compute warpgroups hold the same rows, and each takes one half of the keys of every tile.
With more, they hold different rows and take whole tiles. Rows beyond 128 are split over CTAs; each of these computes
the scores of all rows, since all vote, and attends for its own.

One step is one tile:

- a compute warpgroup multiplies Q @ K^T, leaves the largest score of each of its rows in shared memory (`scored`),
  attends to the tile that was kept before this one, and waits for the decision (`decided`); of a kept tile it computes
  P at once, P @ V in the next step;
- the third warpgroup keeps what each row has seen in the chain, takes the vote, publishes it, and issues the loads of
  V of a kept tile and of K of the tile `stages` steps ahead.

So V is on its way while the scores of the next tile are computed and voted on, and K runs ahead of both. No slot needs
a barrier to tell that it is free: whoever says `scored` for a step has finished with K of that step, and with V of all
kept tiles but the last one. Two slots are enough for V.

V of tiles with empty slots is cleaned, and numbers are represented, as in `dense.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.decode_attention.mosaic_sm90.parts import (
    COLUMN,
    COMPUTE_WARPGROUPS,
    FAR,
    LOG2E,
    ROW,
    ROWS,
    WGMMA,
    Form,
    Shares,
    accumulate,
    clear_rows,
    merge,
    merged_lse,
    own_inputs,
    own_visible,
    pack,
    slot_positions,
    split,
)
from pallas_kernels.decode_attention.operands import Operands
from pallas_kernels.votes import any_of

WIDTH = 128  # of a tile
HEAD_DIMS = (64, 96, 128)
MAX_ROWS = 256  # that vote together: queries times query heads of a key head
V_SLOTS = 2
WAVES = 4  # of work items that the work list has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """Buffers and split. They change speed and, by the order of summation, rounding; never which tiles are skipped.

    Attributes:
      stages: tiles of K that are on their way or waiting.
      num_sms: multiprocessors that the work is split for.
    """

    stages: int = 3
    num_sms: int = 132

    def __post_init__(self):
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1; got {self.stages}")
        if self.num_sms < 1:
            raise ValueError(f"num_sms must be at least 1; got {self.num_sms}")

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        lanes, others = form.lanes, form.row_parts - 1
        block_k = WIDTH // lanes

        def smem(count, rows):
            shape = (count, rows, form.head_dim)
            return plgpu.SMEM(shape, form.dtype, transforms=compat.swizzled(form.dtype, form.head_dim))

        buffers = {
            # Q, and after the last tile the output.
            "qo": smem(COMPUTE_WARPGROUPS, ROWS),
            "lse": plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
            "k": smem(self.stages * lanes, block_k),
            "v": smem(V_SLOTS * lanes, block_k),
            "tops": plgpu.SMEM((COMPUTE_WARPGROUPS * form.row_parts, ROWS), jnp.float32),
            "kept": plgpu.SMEM((1,), jnp.int32),
            "q_ready": plgpu.Barrier(num_arrivals=form.row_parts, num_barriers=COMPUTE_WARPGROUPS),
            "k_ready": plgpu.Barrier(num_arrivals=lanes * (2 if form.listed else 1), num_barriers=self.stages),
            "v_ready": plgpu.Barrier(num_arrivals=lanes, num_barriers=V_SLOTS),
            "unclean": plgpu.Barrier(num_arrivals=lanes),  # V has arrived but must be cleaned
            "scored": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "decided": plgpu.Barrier(),
        }
        if others:  # Q of the rows that other CTAs attend for
            buffers["q_others"] = smem(COMPUTE_WARPGROUPS * others, ROWS)
        if form.listed:
            buffers["positions"] = plgpu.SMEM((self.stages * lanes, block_k), jnp.int32)
        return buffers

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def heuristic_skip_config(form: Form) -> SkipConfig:
    """As much K ahead as fits, up to 96 KiB: half of the multiprocessors may have to draw all of the bandwidth."""
    stages = 6 if form.head_dim <= 64 else 4 if form.head_dim <= 96 else 3
    return SkipConfig(stages=stages if form.row_parts == 1 else 2)


def unsupported_skip(form: Form, tile: SkipTile) -> str | None:
    """Why the kernel cannot skip these tiles, in words; None when it can."""
    if form.code_dtype is not None:
        return f"skips no tiles of a cache of codes; got {form.code_dtype}"
    if tile.width != WIDTH:
        return f"skips tiles of {WIDTH} slots only; got {tile}"
    if form.head_dim not in HEAD_DIMS:
        return f"skips tiles with head_dim in {HEAD_DIMS}; got {form.head_dim}"
    if form.rows > MAX_ROWS:
        return (
            f"lets at most {MAX_ROWS} rows vote; got {form.rows}, {form.num_queries} queries of {form.group} heads "
            "per key head"
        )
    return None


# ---------------------------------------------------------------------------------------------------------------
# The work list


class Plan(NamedTuple):
    """Who reads what."""

    # int32 [W, 7]: 1 if there is work; row of the batch; first of its chains; how many of the item's chains, its first
    # ones, have one tile more than the others; the tiles of the others; own keys (0 / 1); tiles of all, own keys' too.
    items: Array
    shares: Shares
    positions: Array | None  # int32 [B, S in whole tiles]: position of each slot, -1 where it is empty
    unclean: Array | None  # int32 [B, tiles]: 1 where some slot is empty


def plan_of(operands: Operands, form: Form, chains: int, config: SkipConfig) -> Plan:
    """Splits the chains of all rows over the CTAs. Depends on lengths and positions, not on the layer."""
    num_tiles = -(-form.capacity // WIDTH)
    length = -(-jnp.clip(operands.kv_lengths, 0, form.capacity) // WIDTH)
    positions = unclean = None
    if form.listed:
        positions = slot_positions(operands, form, num_tiles * WIDTH)
        unclean = (positions.reshape(form.batch, num_tiles, WIDTH) < 0).any(axis=2).astype(jnp.int32)

    per_wave = config.num_sms // (form.num_kv_heads * form.row_parts)
    num_items = min(form.batch * chains, form.batch + WAVES * per_wave)
    used_chains = jnp.clip(length, 1, chains)
    quotas = jnp.arange(1, num_tiles + 1, dtype=jnp.int32)[:, None]
    counts = jnp.clip(-(-length // quotas), 1, used_chains)  # [quotas, B]
    largest = (-(-used_chains // counts) * -(-length // chains)).max(axis=1)
    cut = split(counts, largest, start=1.0, form=form, num_items=num_items, num_sms=config.num_sms)
    of, length = used_chains[cut.row], length[cut.row]
    first_chain, last_chain = cut.at * of // cut.of, (cut.at + 1) * of // cut.of
    shorter, num_own = length // chains, (cut.at == 0) & form.has_own
    num_long = jnp.clip(length % chains - first_chain, 0, last_chain - first_chain)
    num_steps = num_own + (last_chain - first_chain) * shorter + num_long
    items = [~cut.is_idle, cut.row, first_chain, num_long, shorter, num_own, num_steps]
    return Plan(jnp.stack([x.astype(jnp.int32) for x in items], axis=1), cut.shares, positions, unclean)


# ---------------------------------------------------------------------------------------------------------------
# The attention kernel


# Jitted so that the layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("form", "own_mask", "scale", "chains", "config", "interpret"))
def run(
    q, k_cache, v_cache, operands: Operands, log_threshold, *, form: Form, own_mask, scale, chains: int,
    config: SkipConfig, interpret,
):  # fmt: skip
    """Output, log-sum-exp and which tiles each key head kept."""
    plan = plan_of(operands, form, chains, config)
    parts, part_lse, keep = attend(
        q, k_cache, v_cache, operands, plan, log_threshold, form,
        own_mask=own_mask, scale=scale, chains=chains, config=config, interpret=interpret,
    )  # fmt: skip
    out = merge(parts, part_lse, plan.shares, form, interpret=interpret)
    first_slots = jnp.arange(keep.shape[2]) * WIDTH
    read = first_slots < operands.kv_lengths[:, None]  # nobody wrote the others
    return out, merged_lse(part_lse, plan.shares, form), (keep != 0) & read[:, None]


def attend(
    q, k_cache, v_cache, operands, plan, log_threshold, form: Form, *, own_mask, scale, chains, config, interpret
):
    """Partial outputs and log-sum-exps as in `dense.py`, and kept tiles int8 `[B, K, tiles]` where they are read."""
    stages, lanes, head_dim, dtype = config.stages, form.lanes, form.head_dim, form.dtype
    block_k = WIDTH // lanes
    tile_shape = (ROWS, block_k)
    groups = 1 if form.alternate else COMPUTE_WARPGROUPS * form.row_parts  # of 64 rows
    log2_scale = scale * LOG2E
    num_items = plan.items.shape[0]
    i32 = jnp.int32

    def kernel(refs, results, smem):
        warpgroup = lax.axis_index("warpgroup")
        item, head, part = (lax.axis_index(name) for name in ("item", "head", "part"))
        items = (refs["items"][item, i] for i in range(7))
        has_work, row, first_chain, num_long, shorter, num_own, num_steps = items

        def tile_of(step):
            """Index of the tile of a step, and whether it is the first one of its chain."""
            at = step - num_own
            after = at - num_long * (shorter + 1)
            is_long = after < 0
            at = jnp.where(is_long, at, after)
            per_chain = jnp.where(is_long, shorter + 1, shorter)
            chain = first_chain + jnp.where(is_long, 0, num_long) + lax.div(at, per_chain)
            nth = lax.rem(at, per_chain)
            return chain + nth * chains, nth == 0

        @pl.when((warpgroup < COMPUTE_WARPGROUPS) & (has_work != 0))
        def compute():
            plgpu.set_max_registers(224, action="increase")
            used = refs["used"][row]
            lane = warpgroup if form.alternate else i32(0)
            group = warpgroup if form.alternate else part * COMPUTE_WARPGROUPS + warpgroup
            row0 = 0 if form.alternate else group * ROWS
            rows = compat.first(ROWS, row) if form.alternate else pl.ds(row0, ROWS)
            qo = smem["qo"].at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["q"].at[row, head, rows], qo, smem["q_ready"].at[warpgroup])
            others = []
            for nth in range(1, form.row_parts):
                other_group = lax.rem(part + nth, i32(form.row_parts)) * COMPUTE_WARPGROUPS + warpgroup
                at = (nth - 1) * COMPUTE_WARPGROUPS + warpgroup
                other_rows = refs["q"].at[row, head, pl.ds(other_group * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(other_rows, smem["q_others"].at[at], smem["q_ready"].at[warpgroup])
                others.append((other_group, at))

            def over_rows(x, shape=tile_shape):
                return lax.broadcast_in_dim(x, shape, [0])

            def visible(kind, index, slot):
                """Which pairs of a tile may attend."""
                columns = plgpu.broadcasted_iota(i32, tile_shape, 1, layout=WGMMA) + lane * block_k
                if kind == "own":
                    query = plgpu.broadcasted_iota(i32, (ROWS,), 0, layout=ROW) + row0
                    if form.group > 1:
                        query = lax.div(query, i32(form.group))
                    return own_visible(own_mask, form, query, columns, refs["own_lengths"][row])
                if not form.listed:
                    return columns < used - tile_of(index)[0] * WIDTH
                positions = plgpu.load(smem["positions"].at[slot], layout=COLUMN, optimized=False)
                return plgpu.layout_cast(lax.broadcast_in_dim(positions, tile_shape, [1]), WGMMA) >= 0

            def scores(q, at, keep, slot):
                if others:
                    # The descriptors of both Q would all be computed before the loop and be spilled.
                    at = lax.optimization_barrier(at)

                def multiply_qk(acc_ref):
                    plgpu.wgmma(acc_ref, smem[q].at[at], smem["k"].at[slot].transpose((1, 0)))
                    return acc_ref[...]

                s = pl.run_scoped(multiply_qk, plgpu.ACC(tile_shape, jnp.float32))
                return jnp.where(keep, s * log2_scale, -jnp.inf)

            def multiply_pv(acc, p, num_kept):
                """`acc` and the product of the tile that was kept last."""
                slot = lax.rem(num_kept - 1, i32(V_SLOTS))
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                return accumulate(acc, p, smem["v"].at[slot * lanes + lane], interpreted=interpret is not None)

            def step(index, carry, *, kind):
                """`kind`: the row's "own" keys, or "cached" ones."""
                acc, m, total, p, pending, num_kept = carry
                slot = lax.rem(index, i32(stages))
                plgpu.barrier_wait(smem["k_ready"].at[slot])
                slot = slot * lanes + lane
                keep = visible(kind, index, slot)
                if kind == "cached":
                    for other_group, at in others:
                        smem["tops"][other_group] = scores("q_others", at, keep, slot).max(axis=1)
                s = scores("qo", warpgroup, keep, slot)
                top = s.max(axis=1)
                if kind == "cached":
                    smem["tops"][group] = top
                plgpu.barrier_arrive(smem["scored"])
                acc = lax.cond(pending != 0, lambda acc: multiply_pv(acc, p, num_kept), lambda acc: acc, acc)
                plgpu.barrier_wait(smem["decided"])
                kept = smem["kept"][0]

                def weigh(carry):
                    acc, m, total, _ = carry
                    m_new = jnp.maximum(m, top)
                    # A row that has seen no key yet would compute -inf + inf.
                    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
                    alpha = jnp.exp2(m - m_safe)
                    p = jnp.exp2(s - over_rows(m_safe))
                    return acc * over_rows(alpha, acc.shape), m_new, total * alpha + p.sum(axis=1), p.astype(dtype)

                acc, m, total, p = lax.cond(kept != 0, weigh, lambda carry: carry, (acc, m, total, p))
                return acc, m, total, p, kept, num_kept + kept

            plgpu.barrier_wait(smem["q_ready"].at[warpgroup])
            carry = (
                plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros(tile_shape, dtype), WGMMA),
                i32(0),
                i32(0),
            )
            if form.has_own:
                carry = lax.fori_loop(0, num_own, functools.partial(step, kind="own"), carry)
            carry = lax.fori_loop(num_own, num_steps, functools.partial(step, kind="cached"), carry)
            acc, m, total, p, pending, num_kept = carry
            acc = lax.cond(pending != 0, lambda acc: multiply_pv(acc, p, num_kept), lambda acc: acc, acc)

            empty = total == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
            qo[...] = (acc * over_rows(inverse, acc.shape)).astype(dtype)
            smem["lse"][warpgroup] = jnp.where(empty, -jnp.inf, m + jnp.log2(total))
            plgpu.commit_smem()
            where = item * lanes + lane
            kept_rows = min(ROWS, form.padded_rows)
            plgpu.copy_smem_to_gmem(
                qo.at[pl.ds(0, kept_rows)], results["out"].at[where, head, pl.ds(row0, kept_rows), pl.ds(0, head_dim)]
            )
            plgpu.copy_smem_to_gmem(smem["lse"].at[warpgroup], results["lse"].at[where, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what it writes is there when the kernel ends

        @pl.when((warpgroup == COMPUTE_WARPGROUPS) & (has_work != 0))
        def load():
            plgpu.set_max_registers(56, action="decrease")
            first_slot = (refs["layer"][0] * form.batch + row) * form.capacity
            used = refs["used"][row]
            columns = pl.ds(head * head_dim, head_dim)
            log2_threshold = refs["log2_threshold"][row]

            def copy(name, step, slot, barrier):
                """K or V of one step, the own keys' too, in as many pieces as there are lanes."""
                for half in range(lanes):
                    to = smem[name].at[slot * lanes + half]

                    def copy_cached(half=half, to=to):
                        keys = first_slot + tile_of(step)[0] * WIDTH + half * block_k
                        plgpu.copy_gmem_to_smem(refs[name].at[pl.ds(keys, block_k), columns], to, barrier)

                    def copy_own(to=to):
                        # All own keys are in the first half; the second one is masked, whatever it holds.
                        keys = compat.first(block_k, row)
                        plgpu.copy_gmem_to_smem(refs[f"own_{name}"].at[row, keys, head], to, barrier)

                    if form.has_own:
                        pl.when(step < num_own)(copy_own)
                    pl.when(step >= num_own)(copy_cached)

            def load_k(step):
                slot = lax.rem(step, i32(stages))
                barrier = smem["k_ready"].at[slot]
                copy("k", step, slot, barrier)
                if form.listed:
                    plgpu.commit_smem()  # ordinary reads of the slot before the next TMA
                    tile = jnp.where(step < num_own, 0, tile_of(step)[0])  # own keys need none
                    for half in range(lanes):
                        keys = pl.ds(tile * WIDTH + half * block_k, block_k)
                        to = smem["positions"].at[slot * lanes + half]
                        plgpu.copy_gmem_to_smem(refs["positions"].at[row, keys], to, barrier)

            def is_unclean(step):
                tile = tile_of(step)[0]
                if form.listed:
                    return (step >= num_own) & (refs["unclean"][row, jnp.where(step < num_own, 0, tile)] != 0)
                return (step >= num_own) & ((tile + 1) * WIDTH > used)

            def is_empty(step, first_row):
                """Rows of V `[64]` whose slots are empty."""
                index = plgpu.broadcasted_iota(i32, (ROWS,), 0, layout=ROW) + (tile_of(step)[0] * WIDTH + first_row)
                if not form.listed:
                    return index >= used
                keys = pl.ds(tile_of(step)[0] * WIDTH + first_row, ROWS)
                positions = plgpu.load(refs["positions"].at[row, keys], layout=ROW, optimized=False)
                # Changes nothing but ties the layout to that of the index; without it layout inference fails.
                return jnp.minimum(positions, index) < 0

            def load_v(step, num_kept):
                slot = lax.rem(num_kept, i32(V_SLOTS))
                ready, unclean = smem["v_ready"].at[slot], is_unclean(step)
                pl.when(jnp.logical_not(unclean))(lambda: copy("v", step, slot, ready))

                @pl.when(unclean)
                def load_and_clean():
                    copy("v", step, slot, smem["unclean"])
                    plgpu.barrier_wait(smem["unclean"])
                    for first_row in range(0, WIDTH, ROWS):
                        half, within = divmod(first_row, block_k)
                        v_rows = smem["v"].at[slot * lanes + half, pl.ds(within, ROWS)]
                        clear_rows(v_rows, is_empty(step, first_row))
                    plgpu.commit_smem()
                    for _ in range(lanes):
                        plgpu.barrier_arrive(ready)

            def vote(step, seen):
                """Whether the tile is kept, and what each row has then seen in its chain; the rule, in base 2."""
                tile, is_first = tile_of(step)
                index = plgpu.broadcasted_iota(i32, (ROWS,), 0, layout=ROW)
                restart = jnp.where(is_first, 0, FAR)  # there is no choice between vectors by a scalar
                votes, seen_now = [], []
                for group, before in enumerate(seen):
                    top = load_top(group)
                    if form.alternate:  # the other half of the keys
                        top = jnp.maximum(top, load_top(1))
                    before = jnp.where(index >= restart, -jnp.inf, before)
                    # A row that has seen nothing has an infinite margin to what it sees first.
                    abstains = (top - before < log2_threshold) | (top == -jnp.inf)
                    abstains |= index >= form.rows - group * ROWS
                    votes.append(jnp.where(abstains, 0, 1))
                    seen_now.append(jnp.maximum(before, top))
                one = functools.reduce(jnp.maximum, votes)
                keep = any_of(one, i32(COMPUTE_WARPGROUPS), layout=ROW, interpreted=interpret is not None)

                @pl.when((step >= num_own) & (part == 0))
                def _():
                    results["keep"][row, head, tile] = keep.astype(jnp.int8)

                # Own keys are always kept. Nobody leaves tops of theirs, and what was seen is reset after them.
                return (keep | (step < num_own)).astype(i32), tuple(seen_now)

            def load_top(group):
                return plgpu.load(smem["tops"].at[group], layout=ROW, optimized=False)

            def decide_and_load(step, carry):
                num_kept, seen = carry
                plgpu.barrier_wait(smem["scored"])
                kept, seen = vote(step, seen)
                smem["kept"][0] = kept
                plgpu.barrier_arrive(smem["decided"])
                pl.when(kept != 0)(lambda: load_v(step, num_kept))
                ahead = lax.optimization_barrier(step + stages)  # computed any earlier, it would be spilled
                pl.when(ahead < num_steps)(lambda: load_k(ahead))
                return num_kept + kept, seen

            pl.loop(0, jnp.minimum(num_steps, stages))(load_k)
            nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
            lax.fori_loop(0, num_steps, decide_and_load, (i32(0), (nothing,) * groups))

    layers = k_cache.shape[0]
    flat = (layers * form.batch * form.capacity, form.num_kv_heads * head_dim)
    inputs: dict[str, Any] = {
        "q": pack(q, form),
        "k": k_cache.reshape(flat),
        "v": v_cache.reshape(flat),
        "items": plan.items,
        "layer": jnp.clip(operands.layer, 0, layers - 1).reshape(1),
        "used": jnp.clip(operands.kv_lengths, 0, form.capacity),
        "log2_threshold": log_threshold * LOG2E,
    }
    if form.has_own:
        inputs |= own_inputs(operands, form)
    if form.listed:
        inputs |= {"positions": plan.positions, "unclean": plan.unclean}
    buffers = config.buffers(form)
    heads, num_tiles = form.num_kv_heads, -(-form.capacity // WIDTH)
    results = compat.kernel(
        lambda refs, results, *scratch: kernel(refs, results, dict(zip(buffers, scratch, strict=True))),
        out_type={
            "out": jax.ShapeDtypeStruct((num_items * lanes, heads, form.padded_rows, max(head_dim, 128)), dtype),
            "lse": jax.ShapeDtypeStruct((num_items * lanes, heads, form.whole_rows), jnp.float32),
            "keep": jax.ShapeDtypeStruct((form.batch, heads, num_tiles), jnp.int8),
        },
        # The last axis varies fastest: CTAs that run at the same time read neighbouring memory.
        grid=(num_items, heads, form.row_parts),
        grid_names=("item", "head", "part"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(inputs)
    return results["out"], results["lse"], results["keep"]

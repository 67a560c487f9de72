"""The kernel that reads every live key: few queries, a long cache read once, its length split over the CTAs.

The T queries of the G heads that share one key head are packed into rows, `row = t * G + g`, so that every key is
loaded once for all of them. Two compute warpgroups hold 64 rows each. With more than 64 rows both work on the same
keys (and more than 128 rows take more CTAs, which find the keys in the L2 cache); with up to 64 rows they hold the
same rows and take turns on the tiles of keys. A third warpgroup fills the ring of K and V tiles by TMA. Of a cache of
codes the TMA brings the bytes and this warpgroup converts them to the dtype of the queries between two rings; the
scales go into scores and probabilities.

The stacked cache is read where it lies: the layer index is a number in global memory. Which tiles a CTA reads is a work
list made at run time from the lengths (`plan_of`): the rows of the batch share the multiprocessors in proportion to
their live tiles. The first item of a row also attends to the row's own keys. Each warpgroup leaves a normalised partial
output, rounded to the output dtype, and its log-sum-exp; a second kernel merges them (`parts.merge`).

Tiles whose keys are all visible need no masking. With positions or a window (`listed`) only tiles that some query may
see are listed, and each compares positions. V of tiles with empty slots is cleaned in shared memory before it is used:
a weight of 0 does not stop a NaN.

Scores live in the base-2 domain and are float32, as are sums and accumulators; P is rounded to the input dtype before
P @ V, for codes after it was multiplied by the scales of V.
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
    pad_axis,
    slot_positions,
    split,
)
from pallas_kernels.decode_attention.operands import Operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and split. They change speed and, by the order of summation, rounding; never which keys are seen.

    Attributes:
      block_k: keys of one tile; it also holds all own keys.
      stages: slots of the K and V rings; even, since two warpgroups may take turns on them.
      code_stages: slots of the rings of codes before their conversion.
      num_sms: multiprocessors that the work is split for.
    """

    block_k: int = 64
    stages: int = 4
    code_stages: int = 6
    num_sms: int = 132

    def __post_init__(self):
        if self.block_k not in (64, 128):
            raise ValueError(f"block_k must be 64 or 128; got {self.block_k}")
        if self.stages < 2 or self.stages % 2:
            raise ValueError(f"stages must be even and at least 2; got {self.stages}")
        if self.code_stages < 2 or self.code_stages % 2:
            raise ValueError(f"code_stages must be even and at least 2; got {self.code_stages}")
        if self.num_sms < 1:
            raise ValueError(f"num_sms must be at least 1; got {self.num_sms}")

    def buffers(self, form: "Form") -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        readers = 1 if form.alternate else COMPUTE_WARPGROUPS
        tile = (self.stages, self.block_k, form.head_dim)
        ring = plgpu.SMEM(tile, form.dtype, transforms=compat.swizzled(form.dtype, form.head_dim))
        free = plgpu.Barrier(num_arrivals=readers, num_barriers=self.stages)
        buffers = {
            # Q, and after the last tile the output.
            "qo": plgpu.SMEM(
                (COMPUTE_WARPGROUPS, ROWS, form.head_dim),
                form.dtype,
                transforms=compat.swizzled(form.dtype, form.head_dim),
            ),
            "lse": plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
            "k": ring,
            "v": ring,
            "q_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            "k_ready": plgpu.Barrier(num_barriers=self.stages),
            "v_ready": plgpu.Barrier(num_barriers=self.stages),
            "k_free": free,
            "v_free": free,
        }
        if form.code_dtype is None:
            buffers["unclean"] = plgpu.Barrier()  # V has arrived but must be cleaned
        else:
            codes = plgpu.SMEM(
                (self.code_stages, self.block_k, form.head_dim),
                form.code_dtype,
                transforms=compat.swizzled(form.code_dtype, form.head_dim),
            )
            arrived = plgpu.Barrier(num_barriers=self.code_stages)
            buffers |= {"k_codes": codes, "v_codes": codes, "k_codes_ready": arrived, "v_codes_ready": arrived}
        if lines := form.lines:
            slots = self.line_slots(form)
            buffers |= {name: plgpu.SMEM((slots, self.block_k), dtype) for name, dtype in lines.items()}
            buffers["lines_ready"] = plgpu.Barrier(num_arrivals=len(lines), num_barriers=slots)
        return buffers

    def line_slots(self, form: "Form") -> int:
        """Slots of the rings of positions and scales, which travel with the tile as it leaves global memory."""
        return self.stages + (0 if form.code_dtype is None else self.code_stages)

    def smem_bytes(self, form: "Form") -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def heuristic_config(head_dim: int, *, codes: bool) -> Config:
    """Tiles that compile without spills."""
    if codes:
        return Config(stages=2 if head_dim > 64 else 4)
    if head_dim <= 64:
        return Config(stages=8)
    if head_dim <= 128:
        return Config(stages=4)
    return Config(stages=2)


# ---------------------------------------------------------------------------------------------------------------
# The work list


class Plan(NamedTuple):
    """Who reads what."""

    items: (
        # int32 [W, 6]: 1 if there is work, row of the batch, first and last + 1 of its tiles, own keys (0 / 1), used
        # slots of the row: all that a CTA must know before it loads, for one wait.
        Array
    )
    shares: Shares
    tiles: Array | None  # int32 [B, tiles]: live tiles first, 2 * tile + (1 if some slot is empty)
    positions: Array | None  # int32 [B, S in whole tiles]: position of each slot, -1 where it is empty


def _num_items(form: Form, config: Config) -> int:
    """Work items per key head: one per row, and enough more to fill the multiprocessors once."""
    return form.batch + config.num_sms // (form.num_kv_heads * form.row_parts)


def plan_of(operands: Operands, form: Form, config: Config) -> Plan:
    """Splits the live tiles of all rows over the CTAs. Depends on lengths and positions, not on the layer."""
    num_tiles = -(-form.capacity // config.block_k)
    used = jnp.clip(operands.kv_lengths, 0, form.capacity)
    tiles = positions = None
    if form.listed:
        positions = slot_positions(operands, form, num_tiles * config.block_k)
        by_tile = positions.reshape(form.batch, num_tiles, config.block_k)
        visible = by_tile >= 0
        if operands.window is not None:
            oldest = operands.q_positions.min(axis=1)[:, None, None]
            visible &= (oldest - by_tile < operands.window) | (by_tile < operands.num_sinks)
        live = visible.any(axis=2)
        code = 2 * jnp.arange(num_tiles, dtype=jnp.int32) + (by_tile < 0).any(axis=2)
        # Live tiles first, in order.
        tiles = jnp.sort(jnp.where(live, code, FAR + code), axis=1) % FAR
        length = live.sum(axis=1, dtype=jnp.int32)
    else:
        length = (used + config.block_k - 1) // config.block_k

    num_items = _num_items(form, config)
    quotas = jnp.arange(1, num_tiles + 1, dtype=jnp.int32)  # tiles of the largest item
    counts = jnp.maximum(-(-length // quotas[:, None]), 1)  # [quotas, B]
    cut = split(counts, quotas, start=2.0, form=form, num_items=num_items, num_sms=config.num_sms)
    tiles_of_row = length[cut.row]
    items = [
        ~cut.is_idle,
        cut.row,
        cut.at * tiles_of_row // cut.of,
        (cut.at + 1) * tiles_of_row // cut.of,
        cut.at == 0,
        used[cut.row],
    ]
    return Plan(jnp.stack([x.astype(jnp.int32) for x in items], axis=1), cut.shares, tiles, positions)


# ---------------------------------------------------------------------------------------------------------------
# The attention kernel


# Jitted so that the layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("form", "own_mask", "scale", "config", "interpret"))
def run(q, k_cache, v_cache, operands: Operands, *, form: Form, own_mask, scale, config: Config, interpret):
    plan = plan_of(operands, form, config)
    parts, part_lse = attend(
        q, k_cache, v_cache, operands, plan, form, own_mask=own_mask, scale=scale, config=config, interpret=interpret
    )
    out = merge(parts, part_lse, plan.shares, form, interpret=interpret)
    return out, merged_lse(part_lse, plan.shares, form)


def attend(q, k_cache, v_cache, operands, plan, form: Form, *, own_mask, scale, config: Config, interpret):
    """Partial outputs `[W * lanes, K, padded rows, H or 128]` and base-2 log-sum-exps `[W * lanes, K, whole rows]`."""
    block_k, stages, lanes = config.block_k, config.stages, form.lanes
    head_dim, dtype, lines = form.head_dim, form.dtype, form.lines
    code_stages, line_slots = config.code_stages, config.line_slots(form)
    has_codes = form.code_dtype is not None
    tile = (ROWS, block_k)
    log2_scale = scale * LOG2E
    num_items = plan.items.shape[0]
    # What each loading warpgroup brings; the one of K also brings positions and scales. Codes are converted by the one
    # that brings them, which for K and V together took 1 to 15 % longer.
    loads: list[tuple[str, ...]] = [("k",), ("v",)] if has_codes else [("k", "v")]
    # Registers of compute and loading warpgroups; together they may not exceed 512 per lane.
    compute_registers, load_registers = (168, 80) if has_codes else (224, 56)
    code_columns = min(head_dim, 128)
    i32 = jnp.int32

    def kernel(refs, out_ref, lse_ref, smem):
        warpgroup = lax.axis_index("warpgroup")
        item, head, part = (lax.axis_index(name) for name in ("item", "head", "part"))
        has_work, row, start, stop, num_own, used = (refs["items"][item, i] for i in range(6))
        num_own = num_own if form.has_own else i32(0)
        num_cached = stop - start
        num_steps = num_own + num_cached
        layer = refs["layer"][0]

        def cached_tile(step):
            """Index of the tile of a step and whether it holds empty slots."""
            at = start + step - num_own
            if not form.listed:
                return at, (at + 1) * block_k > used
            code = refs["tiles"][row, at]
            return lax.div(code, i32(2)), lax.rem(code, i32(2)) == 1

        @pl.when((warpgroup < COMPUTE_WARPGROUPS) & (has_work != 0))
        def compute():
            plgpu.set_max_registers(compute_registers, action="increase")
            lane = warpgroup if form.alternate else i32(0)
            row0 = 0 if form.alternate else (part * COMPUTE_WARPGROUPS + warpgroup) * ROWS
            rows = compat.first(ROWS, row) if form.alternate else pl.ds(row0, ROWS)
            qo = smem["qo"].at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["q"].at[row, head, rows], qo, smem["q_ready"].at[warpgroup])
            if form.k_scale == "head":
                k_scale = refs["k_scales"][layer, head].astype(jnp.float32)
            if form.v_scale == "head":
                v_scale = refs["v_scales"][layer, head].astype(jnp.float32)

            def over_rows(x, shape=tile):
                return lax.broadcast_in_dim(x, shape, [0])

            def over_columns(x):
                return plgpu.layout_cast(lax.broadcast_in_dim(x, tile, [1]), WGMMA)

            def near(k_positions):
                """Inside the window, or a sink."""
                q_positions = plgpu.load(refs["q_rows"].at[row, rows], layout=ROW, optimized=False)
                q_positions = plgpu.layout_cast(over_rows(q_positions), WGMMA)
                window, num_sinks = refs["window"][0], refs["window"][1]
                return (q_positions - k_positions < window) | (k_positions < num_sinks)

            def visible(kind, step, k_positions):
                """Which pairs of a tile may attend."""
                columns = plgpu.broadcasted_iota(i32, tile, 1, layout=WGMMA)
                if kind == "cached":
                    if not form.listed:
                        return columns < used - cached_tile(step)[0] * block_k
                    keep = k_positions >= 0
                else:
                    query = plgpu.broadcasted_iota(i32, (ROWS,), 0, layout=ROW) + row0
                    if form.group > 1:
                        query = lax.div(query, i32(form.group))
                    keep = own_visible(own_mask, form, query, columns, refs["own_lengths"][row])
                return keep & near(k_positions) if operands.window is not None else keep

            def load_line(name, slot):
                return plgpu.load(smem[name].at[slot], layout=COLUMN, optimized=False)

            def step(turn, carry, *, kind):
                """`kind`: the row's "own" keys, a tile without masking ("full"), or "cached" with it."""
                acc, m, total = carry
                index = lane + lanes * turn
                slot = lax.rem(index, i32(stages))
                plgpu.barrier_wait(smem["k_ready"].at[slot])

                def multiply_qk(acc_ref):
                    plgpu.wgmma(acc_ref, qo, smem["k"].at[slot].transpose((1, 0)))
                    return acc_ref[...]

                s = pl.run_scoped(multiply_qk, plgpu.ACC(tile, jnp.float32))
                values = {}
                if lines:
                    line_slot = lax.rem(index, i32(line_slots))
                    plgpu.barrier_wait(smem["lines_ready"].at[line_slot])
                    values = {name: load_line(name, line_slot) for name in lines}
                plgpu.barrier_arrive(smem["k_free"].at[slot])
                if kind == "own" or form.k_scale is None:
                    s = s * log2_scale
                elif form.k_scale == "head":
                    s = s * (k_scale * log2_scale)
                else:
                    s = s * over_columns(values["k_scales"].astype(jnp.float32) * log2_scale)
                masked = kind != "full"
                if masked:
                    k_positions = over_columns(values["positions"]) if form.listed else None
                    keep = visible(kind, index, k_positions)
                    s = jnp.where(keep, s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1))
                # A row that has seen no key yet would compute -inf + inf.
                m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - m_safe)
                p = jnp.exp2(s - over_rows(m_safe))
                acc = acc * over_rows(alpha, acc.shape)
                total = total * alpha + p.sum(axis=1)
                if kind != "own" and form.v_scale is not None:
                    if form.v_scale == "head":
                        p = p * v_scale
                    else:
                        p = p * over_columns(values["v_scales"].astype(jnp.float32))
                        if masked:  # the scale of an empty slot may be NaN
                            p = jnp.where(keep, p, 0.0)
                p = p.astype(dtype)
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                acc = accumulate(acc, p, smem["v"].at[slot], interpreted=interpret is not None)
                plgpu.barrier_arrive(smem["v_free"].at[slot])
                return acc, m_new, total

            def turns_before(step):
                """How many of the first `step` steps are this warpgroup's."""
                return step if lanes == 1 else lax.div(jnp.maximum(step - lane + lanes - 1, 0), i32(lanes))

            plgpu.barrier_wait(smem["q_ready"].at[warpgroup])
            carry = (
                plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
            )
            begin = turns_before(num_own)
            if form.has_own:
                carry = lax.fori_loop(0, begin, functools.partial(step, kind="own"), carry)
            if not form.listed:
                num_full = jnp.maximum(jnp.minimum(stop, lax.div(used, i32(block_k))) - start, 0)
                middle = turns_before(num_own + num_full)
                carry = lax.fori_loop(begin, middle, functools.partial(step, kind="full"), carry)
                begin = middle
            carry = lax.fori_loop(begin, turns_before(num_steps), functools.partial(step, kind="cached"), carry)

            acc, m, total = carry
            empty = total == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
            qo[...] = (acc * over_rows(inverse, acc.shape)).astype(dtype)
            smem["lse"][warpgroup] = jnp.where(empty, -jnp.inf, m + jnp.log2(total))
            plgpu.commit_smem()
            where = item * lanes + lane
            kept = min(ROWS, form.padded_rows)
            plgpu.copy_smem_to_gmem(
                qo.at[pl.ds(0, kept)], out_ref.at[where, head, pl.ds(row0, kept), pl.ds(0, head_dim)]
            )
            plgpu.copy_smem_to_gmem(smem["lse"].at[warpgroup], lse_ref.at[where, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what it writes is there when the kernel ends

        def load(names):
            plgpu.set_max_registers(load_registers, action="decrease")
            with_lines = lines if "k" in names else {}
            first_slot = (layer * form.batch + row) * form.capacity
            columns = pl.ds(head * head_dim, head_dim)

            def wait_until_free(name, step):
                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(smem[f"{name}_free"].at[lax.rem(step, i32(stages))])
                    if with_lines or not has_codes:
                        plgpu.commit_smem()  # ordinary reads and writes of the slot before the next TMA

            def load_lines(step):
                """Positions and scales of a cached tile."""
                slot = lax.rem(step, i32(line_slots))
                keys = pl.ds(cached_tile(step)[0] * block_k, block_k)
                for name in with_lines:
                    where = (row, keys) if name == "positions" else (layer, row, head, keys)
                    plgpu.copy_gmem_to_smem(refs[name].at[where], smem[name].at[slot], smem["lines_ready"].at[slot])

            def load_own():
                for name in names:
                    plgpu.copy_gmem_to_smem(
                        refs[f"own_{name}"].at[row, compat.first(block_k, row), head],
                        smem[name].at[0],
                        smem[f"{name}_ready"].at[0],
                    )
                for name in with_lines:
                    if name == "positions":
                        plgpu.copy_gmem_to_smem(
                            refs["own_positions"].at[row], smem[name].at[0], smem["lines_ready"].at[0]
                        )
                    else:
                        plgpu.barrier_arrive(smem["lines_ready"].at[0])  # own keys have no scales

            def cached(name, step):
                return refs[name].at[pl.ds(first_slot + cached_tile(step)[0] * block_k, block_k), columns]

            def is_empty(step, slot, first_row):
                """Rows of V `[64]` whose slots are empty, before they can spoil an output."""
                index = plgpu.broadcasted_iota(i32, (ROWS,), 0, layout=ROW) + first_row
                if not form.listed:
                    return index + cached_tile(step)[0] * block_k >= used
                keys = pl.ds(cached_tile(step)[0] * block_k + first_row, ROWS)
                positions = plgpu.load(refs["positions"].at[row, keys], layout=ROW, optimized=False)
                # Changes nothing but ties the layout to that of the index; without it layout inference fails.
                return jnp.minimum(positions, index + FAR) < 0

            def load_cached(step):
                slot = lax.rem(step, i32(stages))
                wait_until_free("k", step)
                if lines:
                    load_lines(step)
                plgpu.copy_gmem_to_smem(cached("k", step), smem["k"].at[slot], smem["k_ready"].at[slot])
                wait_until_free("v", step)
                _, unclean = cached_tile(step)

                @pl.when(jnp.logical_not(unclean))
                def load_as_it_is():
                    plgpu.copy_gmem_to_smem(cached("v", step), smem["v"].at[slot], smem["v_ready"].at[slot])

                @pl.when(unclean)
                def load_and_clean():
                    plgpu.copy_gmem_to_smem(cached("v", step), smem["v"].at[slot], smem["unclean"])
                    plgpu.barrier_wait(smem["unclean"])
                    for first_row in range(0, block_k, ROWS):
                        clear_rows(smem["v"].at[slot, pl.ds(first_row, ROWS)], is_empty(step, slot, first_row))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(smem["v_ready"].at[slot])

            def load_codes(name, step):
                slot = lax.rem(step - num_own, i32(code_stages))
                plgpu.copy_gmem_to_smem(
                    cached(name, step), smem[f"{name}_codes"].at[slot], smem[f"{name}_codes_ready"].at[slot]
                )

            def convert(name, step):
                """Codes of one tile to the ring that the tensor core reads."""
                slot, code_slot = lax.rem(step, i32(stages)), lax.rem(step - num_own, i32(code_stages))
                plgpu.barrier_wait(smem[f"{name}_codes_ready"].at[code_slot])
                wait_until_free(name, step)
                for first_row in range(0, block_k, ROWS):
                    if name == "v":
                        empty = is_empty(step, slot, first_row)
                    for column in range(0, head_dim, code_columns):
                        where = (pl.ds(first_row, ROWS), pl.ds(column, code_columns))
                        codes = plgpu.load(
                            smem[f"{name}_codes"].at[code_slot, *where], layout=plgpu.Layout.WGMMA_UPCAST_2X
                        )
                        if codes.dtype != jnp.int8:
                            codes = codes.astype(jnp.float16)
                        x = plgpu.layout_cast(codes.astype(dtype), WGMMA)
                        if name == "v":
                            x = jnp.where(lax.broadcast_in_dim(empty, x.shape, [0]), jnp.zeros_like(x), x)
                        smem[name].at[slot, *where][...] = x
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem[f"{name}_ready"].at[slot])

            if form.has_own:
                pl.when(num_own > 0)(load_own)
            if not has_codes:
                pl.loop(num_own, num_steps)(load_cached)

            else:

                @pl.loop(num_own, jnp.minimum(num_steps, num_own + code_stages))
                def first_codes(step):
                    for name in names:
                        load_codes(name, step)
                    if with_lines:
                        load_lines(step)

                @pl.loop(num_own, num_steps)
                def convert_and_refill(step):
                    for name in names:
                        convert(name, step)

                        @pl.when(step + code_stages < num_steps)
                        def _(name=name):
                            load_codes(name, step + code_stages)
                            if name == "k" and with_lines:
                                load_lines(step + code_stages)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _(step):
                slot = lax.rem(step, i32(stages))
                for name in names:
                    plgpu.barrier_wait(smem[f"{name}_free"].at[slot])

        for index, names in enumerate(loads):
            pl.when((warpgroup == COMPUTE_WARPGROUPS + index) & (has_work != 0))(functools.partial(load, names))

    layers = k_cache.shape[0]
    flat = (layers * form.batch * form.capacity, form.num_kv_heads * head_dim)
    inputs: dict[str, Any] = {
        "q": pack(q, form),
        "k": k_cache.reshape(flat),
        "v": v_cache.reshape(flat),
        "items": plan.items,
        "layer": jnp.clip(operands.layer, 0, layers - 1).reshape(1),
    }
    if form.has_own:
        inputs |= own_inputs(operands, form)
    if form.listed:
        inputs |= {"tiles": plan.tiles, "positions": plan.positions}
        if form.has_own:
            inputs["own_positions"] = pad_axis(operands.q_positions, 1, block_k)
    if operands.window is not None:
        by_row = jnp.repeat(operands.q_positions, form.group, axis=1)
        inputs["q_rows"] = pad_axis(by_row, 1, form.whole_rows)
        inputs["window"] = jnp.stack([jnp.asarray(x, jnp.int32) for x in (operands.window, operands.num_sinks)])
    if form.k_scale is not None:
        inputs |= {"k_scales": operands.k_scale, "v_scales": operands.v_scale}
    buffers = config.buffers(form)
    return compat.kernel(
        lambda refs, out_ref, lse_ref, *scratch: kernel(
            refs, out_ref, lse_ref, dict(zip(buffers, scratch, strict=True))
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_items * lanes, form.num_kv_heads, form.padded_rows, max(head_dim, 128)), dtype),
            jax.ShapeDtypeStruct((num_items * lanes, form.num_kv_heads, form.whole_rows), jnp.float32),
        ),
        # The last axis varies fastest: CTAs that run at the same time read neighbouring memory.
        grid=(num_items, form.num_kv_heads, form.row_parts),
        grid_names=("item", "head", "part"),
        num_threads=COMPUTE_WARPGROUPS + len(loads),
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(inputs)

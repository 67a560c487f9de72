"""What the decode kernels share: the form of a call, packed queries, own keys, and the merge of partial results."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_attention.operands import CODES, Operands
from pallas_kernels.masks import Mask

LOG2E = math.log2(math.e)
COMPUTE_WARPGROUPS = 2
ROWS = 64  # of one compute warpgroup
MERGED_AT_ONCE = (8, 40)  # partial results that the merge kernel has in flight: least and most
FAR = 2**30  # beyond every index and position

WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Form(NamedTuple):
    """What is static about a call."""

    batch: int
    num_queries: int
    num_kv_heads: int
    group: int
    head_dim: int
    capacity: int
    dtype: Any
    code_dtype: Any  # None: the cache has the dtype of the queries
    has_own: bool
    listed: bool  # positions decide: tiles come from a list and all compare positions
    k_scale: Any  # None, "head", or the dtype of scales per token
    v_scale: Any

    @property
    def rows(self) -> int:
        return self.num_queries * self.group

    @property
    def alternate(self) -> bool:
        """Both warpgroups hold all rows and take turns on the tiles."""
        return self.rows <= ROWS

    @property
    def lanes(self) -> int:
        return COMPUTE_WARPGROUPS if self.alternate else 1

    @property
    def row_parts(self) -> int:
        """CTAs that share the rows of one key head."""
        return 1 if self.alternate else -(-self.rows // (COMPUTE_WARPGROUPS * ROWS))

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // 8) * 8 if self.alternate else self.row_parts * COMPUTE_WARPGROUPS * ROWS

    @property
    def whole_rows(self) -> int:
        """Rows in whole warpgroups."""
        return -(-self.padded_rows // ROWS) * ROWS

    @property
    def lines(self) -> dict[str, Any]:
        """What comes with each tile of keys beside K and V: one value per key, by name, with its dtype."""
        lines = {"positions": jnp.int32} if self.listed else {}
        for name, kind in (("k_scales", self.k_scale), ("v_scales", self.v_scale)):
            if kind not in (None, "head"):
                lines[name] = kind
        return lines


def form_of(q: Any, k_cache: Any, operands: Operands) -> Form:
    batch, num_queries, num_heads, head_dim = q.shape
    capacity, num_kv_heads = k_cache.shape[2:4]

    def kind(scales):
        if scales is None:
            return None
        return "head" if scales.ndim == 2 else jnp.dtype(scales.dtype)

    return Form(
        batch=batch,
        num_queries=num_queries,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        dtype=jnp.dtype(q.dtype),
        code_dtype=jnp.dtype(k_cache.dtype) if str(k_cache.dtype) in CODES else None,
        has_own=operands.own_k is not None,
        listed=operands.k_positions is not None or operands.window is not None,
        k_scale=kind(operands.k_scale),
        v_scale=kind(operands.v_scale),
    )


def pad_axis(x: Array, axis: int, size: int, value: int = 0) -> Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def pack(q: Array, form: Form) -> Float[Array, "B K rows H"]:
    """Queries as rows of their key head."""
    q = q.reshape(form.batch, form.num_queries, form.num_kv_heads, form.group, form.head_dim)
    q = jnp.swapaxes(q, 1, 2).reshape(form.batch, form.num_kv_heads, form.rows, form.head_dim)
    return pad_axis(q, 2, compat.whole_atoms(form.rows) if form.alternate else form.padded_rows)


def slot_positions(operands: Operands, form: Form, num_slots: int) -> Int[Array, "B num_slots"]:
    """Position that each slot holds, -1 where it is empty, filled up to `num_slots`."""
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    if operands.k_positions is None:
        positions = jnp.broadcast_to(slots, (form.batch, num_slots))
    else:
        missing = num_slots - form.capacity
        positions = jnp.pad(operands.k_positions, ((0, 0), (0, missing)), constant_values=-1)
    used = jnp.clip(operands.kv_lengths, 0, form.capacity)
    return jnp.where(slots < used[:, None], positions, -1)


def own_inputs(operands: Operands, form: Form) -> dict[str, Array]:
    """The kernel's arrays of own keys; values beyond the length of a row are 0."""
    own_v, own_lengths = operands.own_v, operands.own_lengths
    assert operands.own_k is not None and own_v is not None
    if own_lengths is None:
        own_lengths = jnp.full((form.batch,), form.num_queries, jnp.int32)
    else:
        index = jnp.arange(form.num_queries)
        own_v = jnp.where((index < own_lengths[:, None])[:, :, None, None], own_v, 0)
    length = compat.whole_atoms(form.num_queries)
    return {
        "own_k": pad_axis(operands.own_k, 1, length),
        "own_v": pad_axis(own_v, 1, length),
        "own_lengths": own_lengths,
    }


def own_visible(own_mask: Mask, form: Form, query: Array, columns: Array, own_length: Any) -> Array:
    """Which own keys, whose indices are `columns [rows, keys]`, the `query` index of each row sees."""
    keep: Any = None
    for first, last in own_mask.key_intervals(query, form.num_queries):
        # Ends that are the same for all rows would leave the compiler without a layout to infer; the bounds FAR away
        # change nothing and tie them to the rows.
        first = jnp.maximum(jnp.maximum(first, 0), query - FAR)
        last = jnp.minimum(jnp.minimum(last, own_length), query + FAR)
        first, last = (lax.broadcast_in_dim(x, columns.shape, [0]) for x in (first, last))
        inside = (columns >= first) & (columns < last)
        keep = inside if keep is None else keep | inside
    return keep


def clear_rows(v_smem: Any, empty: Array) -> None:
    """Zeros in the `empty` rows of 64 values, before they can spoil an output."""
    head_dim = v_smem.shape[1]
    columns = compat.swizzled(v_smem.dtype, head_dim)[0].tiling[1]
    for column in range(0, head_dim, columns):
        here = v_smem.at[:, pl.ds(column, columns)]
        x = plgpu.load(here, layout=WGMMA)
        here[...] = jnp.where(lax.broadcast_in_dim(empty, x.shape, [0]), jnp.zeros_like(x), x)


def accumulate(acc: Array, p: Array, v_smem: Any, *, interpreted: bool) -> Array:
    """`acc + p @ v` with p in registers.

    The interpreter knows neither a left operand in registers nor an accumulator that does not start at zero; this
    is the one operation that it runs as something else.
    """
    if interpreted:
        acc = acc + jnp.dot(p.astype(jnp.float32), v_smem[...].astype(jnp.float32))
        plgpu.commit_smem()  # an ordinary read, unlike that of wgmma, must be fenced against the refill
        return acc
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p, v_smem))(plgpu.ACC.init(acc))


class Shares(NamedTuple):
    """Which partial results are whose: row b owns the work items `first[b] .. first[b] + num[b] - 1`."""

    first: Array  # int32 [B]
    num: Array  # int32 [B]


class Split(NamedTuple):
    """The work of all rows cut into items: what each item is, and whose partial results are whose."""

    row: Array  # int32 [W]: row of the batch; of an idle item one too, so that reading at it is safe
    is_idle: Array  # bool [W]
    at: Array  # int32 [W]: which of its row's items it is
    of: Array  # int32 [W]: how many items its row has
    shares: Shares


def split(counts: Array, steps: Array, *, start: float, form: Form, num_items: int, num_sms: int) -> Split:
    """Cuts rows into items so that the multiprocessors finish first.

    Args:
      counts: int32 [Q, B], items per row for each of Q ways to cut; the way with one item per row is among them.
      steps: [Q], steps of the largest item of each way.
      start: what an item costs beside its steps, in steps.
      form: of the call.
      num_items: most items; a way that needs more is not taken.
      num_sms: multiprocessors. A wave of them is taken to last as long as the largest item.
    """
    total = counts.sum(axis=1)
    waves = -(-total * (form.num_kv_heads * form.row_parts) // num_sms)
    time = waves * (steps + start) + total / num_items
    count = counts[jnp.argmin(jnp.where(total <= num_items, time, jnp.inf))]
    stop = jnp.cumsum(count)
    first = stop - count
    item = jnp.arange(num_items, dtype=jnp.int32)
    row = (item[:, None] >= stop).sum(axis=1, dtype=jnp.int32)
    is_idle = row >= form.batch
    row = jnp.minimum(row, form.batch - 1)
    shares = Shares(first.astype(jnp.int32), count.astype(jnp.int32))
    return Split(row, is_idle, item - first[row], count[row], shares)


def merged_lse(part_lse: Array, shares: Shares, form: Form) -> Float[Array, "B N T"]:
    """Natural log-sum-exp of each query, from the base-2 ones of the partial results."""
    part = jnp.arange(part_lse.shape[0])
    mine = (part >= form.lanes * shares.first[:, None]) & (part < form.lanes * (shares.first + shares.num)[:, None])
    scores = jnp.where(mine[:, :, None, None], part_lse[None, :, :, : form.rows], -jnp.inf)  # [B, W, K, rows]
    lse = jax.nn.logsumexp(scores * math.log(2.0), axis=1)
    lse = lse.reshape(form.batch, form.num_kv_heads, form.num_queries, form.group)
    return jnp.swapaxes(lse, 2, 3).reshape(form.batch, -1, form.num_queries)


def merge(parts: Array, part_lse: Array, shares: Shares, form: Form, *, interpret) -> Float[Array, "B T N H"]:
    """Outputs from the normalised partial ones: one warpgroup per query and head."""
    width = parts.shape[3]
    # One turn for rows that have even shares of the parts: each turn waits for the memory.
    least, most = MERGED_AT_ONCE
    at_once = min(max(-(-parts.shape[0] // form.batch), least), most)
    i32 = jnp.int32

    def kernel(parts_ref, lse_ref, first_ref, count_ref, out_ref):
        row, head, line = (lax.axis_index(name) for name in ("row", "head", "line"))
        first, count = first_ref[row] * form.lanes, count_ref[row] * form.lanes

        def merge_some(turn, carry):
            acc, m, total = carry
            scores, values = [], []
            for i in range(at_once):
                at = turn * at_once + i
                where = first + jnp.minimum(at, count - 1)
                scores.append(jnp.where(at < count, lse_ref[where, head, line], -jnp.inf))
                values.append(plgpu.load(parts_ref.at[where, head, line], layout=_strided(width)))
            m_new = functools.reduce(jnp.maximum, scores, m)
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            alpha = jnp.exp2(m - m_safe)
            acc, total = acc * alpha, total * alpha
            for score, value in zip(scores, values, strict=True):
                weight = jnp.exp2(score - m_safe)
                acc, total = acc + value.astype(jnp.float32) * weight, total + weight
            return acc, m_new, total

        start = (
            plgpu.layout_cast(jnp.zeros((width,), jnp.float32), _strided(width)),
            jnp.float32(-jnp.inf),
            jnp.float32(0.0),
        )
        turns = lax.div(count + at_once - 1, i32(at_once))
        acc, _, total = lax.fori_loop(0, turns, merge_some, start)
        inverse = jnp.where(total == 0.0, 0.0, 1.0 / jnp.where(total == 0.0, 1.0, total))
        query, member = lax.div(line, i32(form.group)), lax.rem(line, i32(form.group))
        out_ref[row, query, head * form.group + member] = (acc * inverse).astype(form.dtype)

    out = compat.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(
            (form.batch, form.num_queries, form.num_kv_heads * form.group, width), form.dtype
        ),
        grid=(form.batch, form.num_kv_heads, form.rows),
        grid_names=("row", "head", "line"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(parts, part_lse, shares.first, shares.num)
    return out[..., : form.head_dim]


def _strided(width: int) -> Any:
    return plgpu.Layout.WG_STRIDED((width,), vec_size=width // 128)

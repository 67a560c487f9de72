"""Hopper kernel of norm and rotation: one warp for each head of each row.

With few rows there is little to do but to wait for memory: a lane asks for its part of the head, of the weight and of
the tables before it computes anything, all of it in one latency. It holds the channels i and i + H / 2 of a pair, so
that only the sum of squares goes from lane to lane. The heads of all arrays are numbered through, and a CTA takes the
next four; which array a head is of is a choice between pointers and no branch. Heads in parts are added up as they are
read; such arrays may have no norm, and are just that sum.

Pallas knows no warps with work of their own: the body is written in MLIR. The interpreter runs another body, which
shares grid, numbering and layout with it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.partial import Partial, made

WARPS, LANES = 4, 32  # of a CTA, of a warp
MAX_HEAD_DIM = 256
ACTIVATIONS = ("bfloat16", "float32")
WEIGHTS = ("bfloat16", "float32")


def unsupported(
    heads: Sequence[Any], weights: Sequence[Any], cos: Any, sin: Any, *, interpret: Any = None
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Heads are `[..., N, H]`."""
    dtype, head_dim = heads[0].dtype, heads[0].shape[-1]
    if str(dtype) not in ACTIVATIONS:
        return f"needs heads in {' or '.join(ACTIVATIONS)}; got {dtype}"
    if head_dim % (2 * LANES) or head_dim > MAX_HEAD_DIM:
        return f"needs a head dim of a multiple of {2 * LANES} up to {MAX_HEAD_DIM}; got {head_dim}"
    given = [weight for weight in weights if weight is not None]
    if not given:
        return "needs the weight of a norm"
    for weight in given:
        if str(weight.dtype) not in WEIGHTS or weight.dtype != given[0].dtype:
            return f"needs all weights in one of {', '.join(WEIGHTS)}; got {weight.dtype}"
    if str(cos.dtype) != "float32" or str(sin.dtype) != "float32":
        return f"needs tables in float32; got {cos.dtype} and {sin.dtype}"
    if len({x.parts.shape if isinstance(x, Partial) else None for x in heads}) > 1:
        return "needs as many parts of all heads"
    if (most := max(x.parts.size if isinstance(x, Partial) else math.prod(x.shape) for x in heads)) >= 2**31:
        return f"needs fewer than 2^31 elements in an array; got {most}"
    return None if interpret is not None else compat.missing_hopper()


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def run(
    heads: Sequence[Float[Array, "M _ H"] | Partial],
    weights: Sequence[Float[Array, " H"] | None],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    *,
    epsilon: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M _ H"], ...]:
    """Norm and rotation of the heads of M rows, in their dtype; see `norm_rope`.

    Args:
      heads: arrays, whose numbers of heads may differ, or all in parts.
      weights: of the norm of each of the arrays, or None.
      cos: of each row.
      sin: of each row.
      epsilon: of the norm.
      interpret: runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: shapes or dtypes that the kernel does not take.
    """
    reason = unsupported(heads, weights, cos, sin, interpret=interpret or object())
    if reason is not None:
        raise NotImplementedError(f"norm_rope on Hopper {reason}")
    total = len(cos) * sum(x.shape[1] for x in heads)
    if total == 0:
        return tuple(map(made, heads))
    form = _Form(
        tuple(x.shape[1] for x in heads),
        tuple(x.first if isinstance(x, Partial) else None for x in heads),
        tuple(weight is not None for weight in weights),
        epsilon,
    )

    def norm_rope(heads_refs, weight_refs, cos_ref, sin_ref, *out_refs):
        body = _interpreted if interpret is not None else _one_each
        body(lax.axis_index("four"), heads_refs, weight_refs, cos_ref, sin_ref, out_refs, form)

    return tuple(
        compat.kernel(
            norm_rope,
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads],
            grid=(-(-total // WARPS),),
            grid_names=("four",),
            num_threads=1,
            thread_name="warpgroup",
            interpret=interpret,
        )(
            [x.parts if isinstance(x, Partial) else x for x in heads],
            [weight for weight in weights if weight is not None],
            cos,
            sin,
        )
    )


class _Form(NamedTuple):
    """What is static about the arrays of heads."""

    counts: tuple[int, ...]  # heads of each
    first: tuple[int | None, ...]  # columns among those of its parts; None: an array
    has_norm: tuple[bool, ...]
    epsilon: float

    def weights(self, given: Sequence[Any]) -> list[Any]:
        """Of each array that of its norm, or any."""
        own = iter(given)
        return [next(own) if here else given[0] for here in self.has_norm]


def _interpreted(
    four: Any, heads_refs: Any, weight_refs: Any, cos_ref: Any, sin_ref: Any, out_refs: Any, form: _Form
) -> None:
    counts, epsilon = form.counts, form.epsilon
    rows, head_dim = cos_ref.shape[0], out_refs[0].shape[2]
    half = head_dim // 2
    for warp in range(WARPS):
        row, head = jnp.divmod(four * WARPS + warp, sum(counts))
        firsts = itertools.accumulate(counts, initial=0)
        arrays = zip(firsts, heads_refs, form.weights(weight_refs), out_refs, strict=False)
        for i, (first, x_ref, weight_ref, out_ref) in enumerate(arrays):

            @pl.when((row < rows) & (head >= first) & (head < first + counts[i]))
            def _(i=i, row=row, nth=head - first, x_ref=x_ref, weight_ref=weight_ref, out_ref=out_ref):
                if (column := form.first[i]) is None:
                    x = x_ref[row, nth].astype(jnp.float32)
                else:
                    own = x_ref[:, row, pl.ds(column + nth * head_dim, head_dim)]
                    x = functools.reduce(jnp.add, own).astype(out_ref.dtype).astype(jnp.float32)
                if not form.has_norm[i]:
                    out_ref[row, nth] = x.astype(out_ref.dtype)
                    return
                scale = lax.rsqrt((x * x).sum() * (1 / head_dim) + epsilon)
                normed = (x * scale * weight_ref[...].astype(jnp.float32)).astype(out_ref.dtype).astype(jnp.float32)
                a, b, cos, sin = normed[:half], normed[half:], cos_ref[row], sin_ref[row]
                rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin])
                out_ref[row, nth] = rotated.astype(out_ref.dtype)


def _one_each(
    four: Any, heads_refs: Any, weight_refs: Any, cos_ref: Any, sin_ref: Any, out_refs: Any, form: _Form
) -> None:
    """Each warp takes one head of one row, all in global memory. The last warps may repeat the last head."""
    counts, epsilon = form.counts, form.epsilon
    head_dim, rows, together = out_refs[0].shape[2], cos_ref.shape[0], sum(counts)
    parts, part_rows, columns = (1, 0, 0) if form.first[0] is None else heads_refs[0].shape
    half = head_dim // 2
    width = math.gcd(half // LANES, 4)  # elements that a lane reads at a time
    refs = (*heads_refs, *weight_refs, cos_ref, sin_ref, *out_refs)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *(plgpu.RefType(),) * len(refs)))
    def body(ctx, four, *refs):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        several = ir.VectorType.get((width,), f32)
        constant = lambda value: mgpu.c(value, i32)  # noqa: E731
        add, scaled = arith.addi, lambda a, factor: arith.muli(a, constant(factor))
        splat = lambda value: vector.broadcast(several, value)  # noqa: E731
        dtypes = [ir.MemRefType(ref.type).element_type for ref in refs]
        bases = [mgpu_utils.memref_ptr(ref) for ref in refs]
        n, norms = len(counts), sum(form.has_norm)
        inputs, of_weights, (cos_base, sin_base), outputs = (
            bases[:n], form.weights(bases[n : n + norms]), bases[n + norms : n + norms + 2], bases[n + norms + 2 :],
        )  # fmt: skip
        dtype, weight_dtype, x_dtype = dtypes[-1], dtypes[n], dtypes[0]

        thread = arith.remui(mgpu.thread_idx(), constant(WARPS * LANES))
        warp, lane = arith.divui(thread, constant(LANES)), arith.remui(thread, constant(LANES))
        task = arith.minui(add(scaled(four.registers.item(), WARPS), warp), constant(rows * together - 1))
        row, head = arith.divui(task, constant(together)), arith.remui(task, constant(together))

        def of_array(i, nth):
            """Where a head is, if it is the nth of this array: in what is read and in what is written, from where."""
            index = scaled(add(scaled(row, counts[i]), nth), head_dim)
            column, has_norm = form.first[i], mgpu.c(int(form.has_norm[i]), ir.IntegerType.get_signless(1))
            start = index if column is None else add(scaled(row, columns), add(scaled(nth, head_dim), constant(column)))
            return inputs[i], of_weights[i], outputs[i], start, index, has_norm

        here = of_array(0, head)
        for i, first in enumerate(itertools.accumulate(counts[:-1]), 1):
            is_own = arith.cmpi(arith.CmpIPredicate.uge, head, constant(first))
            own = of_array(i, arith.subi(head, constant(first)))
            here = tuple(arith.select(is_own, a, b) for a, b in zip(own, here, strict=True))
        x_base, weight_base, out_base, start, out_start, has_norm = here

        def place(base, offset, element):
            return mgpu_utils.getelementptr(base, [offset], element)

        def read(base, offset, element):
            value = llvm.load(ir.VectorType.get((width,), element), place(base, offset, element))
            return value if element == f32 else arith.extf(several, value)

        # Everything that a lane needs, its channels in both halves of the head.
        channels = [add(scaled(lane, width), constant(i)) for i in range(0, half, width * LANES)]
        table = scaled(row, half)

        def read_x(offset):
            """Of an array, or the sum of its parts, which is rounded as an array is."""
            own = [
                read(x_base, add(add(start, offset), constant(j * part_rows * columns)), x_dtype) for j in range(parts)
            ]
            total = functools.reduce(arith.addf, own)
            if x_dtype == dtype or dtype == f32:
                return total
            return arith.extf(several, rounded(total))

        def rounded(value):
            if dtype == f32:
                return value
            return arith.truncf(ir.VectorType.get((width,), dtype), value)

        pairs = [tuple(read_x(add(channel, constant(side))) for side in (0, half)) for channel in channels]
        weights = [
            tuple(read(weight_base, add(channel, constant(side)), weight_dtype) for side in (0, half))
            for channel in channels
        ]
        tables = [tuple(read(base, add(table, channel), f32) for base in (cos_base, sin_base)) for channel in channels]

        squares = splat(mgpu.c(0.0, f32))
        for value in itertools.chain.from_iterable(pairs):
            squares = arith.addf(squares, arith.mulf(value, value))
        square = vector.reduction(f32, vector.CombiningKind.ADD, squares)
        square = mgpu_utils.warp_tree_reduce(square, arith.addf, LANES)
        mean = arith.addf(arith.mulf(square, mgpu.c(1 / head_dim, f32)), mgpu.c(epsilon, f32))
        scale = splat(llvm.inline_asm(f32, [mean], "rsqrt.approx.f32 $0, $1;", "=f,f"))

        def normed(value, weight):
            value = rounded(arith.mulf(arith.mulf(value, scale), weight))
            return value if dtype == f32 else arith.extf(several, value)

        for channel, (x, y), (for_a, for_b), (cos, sin) in zip(channels, pairs, weights, tables, strict=True):
            a, b = normed(x, for_a), normed(y, for_b)
            new_a = arith.subf(arith.mulf(a, cos), arith.mulf(b, sin))
            new_b = arith.addf(arith.mulf(b, cos), arith.mulf(a, sin))
            for side, value, plain in ((0, new_a, x), (half, new_b, y)):
                value = value if all(form.has_norm) else arith.select(has_norm, value, plain)
                llvm.store(rounded(value), place(out_base, add(add(out_start, channel), constant(side)), dtype))
        return ()

    body(four, *refs)


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: few and many rows of queries and keys, head dims and dtypes."""
    from pallas_kernels.compile_gate import CompileCase

    array = jax.ShapeDtypeStruct
    shapes = [
        *((rows, 128, "bfloat16", "bfloat16") for rows in (1, 1024)),
        *((3, head_dim, *dtypes) for head_dim in (64, 192, 256) for dtypes in itertools.product(ACTIVATIONS, WEIGHTS)),
    ]
    for rows, head_dim, dtype, weights in shapes:
        table = array((rows, head_dim // 2), jnp.float32)
        tables, norm = (table, table), array((head_dim,), weights)
        avals: Any
        name = f"norm rope M={rows} N=32+8 H={head_dim} {dtype} weights {weights}"
        function = functools.partial(run, epsilon=1e-6)
        avals = ([array((rows, n, head_dim), dtype) for n in (32, 8)], [norm] * 2, *tables)
        yield CompileCase(name=name, function=function, avals=avals, required=())
        if rows > 16:
            continue
        parts = array((6, 8, 48 * head_dim), jnp.float32)
        first = zip((0, 32, 40), (32, 8, 8), strict=True)
        heads = [Partial(parts, f * head_dim, n * head_dim, (rows, n, head_dim), jnp.dtype(dtype)) for f, n in first]
        avals = (heads, [norm, norm, None], *tables)
        yield CompileCase(name=f"{name} in 6 parts", function=function, avals=avals, required=())

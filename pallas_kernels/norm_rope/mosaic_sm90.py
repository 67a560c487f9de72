"""Hopper kernel of norm and rotation: one warp for each head of each row.

With few rows there is little to do but to wait for memory: a lane asks for its part of the head, of the weight and of
the tables before it computes anything, all of it in one latency. It holds the channels i and i + H / 2 of a pair, so
that only the sum of squares goes from lane to lane. The heads of all arrays are numbered through, and a CTA takes the
next four; which array a head is of is a choice between pointers and no branch.

Pallas knows no warps with work of their own: the body is written in MLIR. The interpreter runs another body, which
shares grid, numbering and layout with it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

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
    for weight in weights:
        if str(weight.dtype) not in WEIGHTS or weight.dtype != weights[0].dtype:
            return f"needs all weights in one of {', '.join(WEIGHTS)}; got {weight.dtype}"
    if str(cos.dtype) != "float32" or str(sin.dtype) != "float32":
        return f"needs tables in float32; got {cos.dtype} and {sin.dtype}"
    if (most := max(math.prod(x.shape) for x in heads)) >= 2**31:
        return f"needs fewer than 2^31 elements in an array; got {most}"
    return None if interpret is not None else compat.missing_hopper()


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def run(
    heads: Sequence[Float[Array, "M _ H"]],
    weights: Sequence[Float[Array, " H"]],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    *,
    epsilon: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M _ H"], ...]:
    """Norm and rotation of the heads of M rows, in their dtype; see `norm_rope`.

    Args:
      heads: arrays, whose numbers of heads may differ.
      weights: of the norm of each of the arrays.
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
        return tuple(heads)

    def norm_rope(heads_refs, weight_refs, cos_ref, sin_ref, *out_refs):
        body = _interpreted if interpret is not None else _one_each
        body(lax.axis_index("four"), heads_refs, weight_refs, cos_ref, sin_ref, out_refs, epsilon)

    return tuple(
        compat.kernel(
            norm_rope,
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads],
            grid=(-(-total // WARPS),),
            grid_names=("four",),
            num_threads=1,
            thread_name="warpgroup",
            interpret=interpret,
        )(list(heads), list(weights), cos, sin)
    )


def _interpreted(
    four: Any, heads_refs: Any, weight_refs: Any, cos_ref: Any, sin_ref: Any, out_refs: Any, epsilon: float
) -> None:
    counts = [ref.shape[1] for ref in heads_refs]
    head_dim, rows = heads_refs[0].shape[2], cos_ref.shape[0]
    half = head_dim // 2
    for warp in range(WARPS):
        row, head = jnp.divmod(four * WARPS + warp, sum(counts))
        for first, x_ref, weight_ref, out_ref in zip(
            itertools.accumulate(counts, initial=0), heads_refs, weight_refs, out_refs, strict=False
        ):

            @pl.when((row < rows) & (head >= first) & (head < first + x_ref.shape[1]))
            def _(row=row, nth=head - first, x_ref=x_ref, weight_ref=weight_ref, out_ref=out_ref):
                x = x_ref[row, nth].astype(jnp.float32)
                scale = lax.rsqrt((x * x).sum() * (1 / head_dim) + epsilon)
                normed = (x * scale * weight_ref[...].astype(jnp.float32)).astype(out_ref.dtype).astype(jnp.float32)
                a, b, cos, sin = normed[:half], normed[half:], cos_ref[row], sin_ref[row]
                rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin])
                out_ref[row, nth] = rotated.astype(out_ref.dtype)


def _one_each(
    four: Any, heads_refs: Any, weight_refs: Any, cos_ref: Any, sin_ref: Any, out_refs: Any, epsilon: float
) -> None:
    """Each warp takes one head of one row, all in global memory. The last warps may repeat the last head."""
    counts = [ref.shape[1] for ref in heads_refs]
    head_dim, rows, together = heads_refs[0].shape[2], cos_ref.shape[0], sum(counts)
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
        n = len(counts)
        inputs, of_weights, (cos_base, sin_base), outputs = (
            bases[:n], bases[n : 2 * n], bases[2 * n : 2 * n + 2], bases[2 * n + 2 :],
        )  # fmt: skip
        dtype, weight_dtype = dtypes[0], dtypes[n]

        thread = arith.remui(mgpu.thread_idx(), constant(WARPS * LANES))
        warp, lane = arith.divui(thread, constant(LANES)), arith.remui(thread, constant(LANES))
        task = arith.minui(add(scaled(four.registers.item(), WARPS), warp), constant(rows * together - 1))
        row, head = arith.divui(task, constant(together)), arith.remui(task, constant(together))
        x_base, weight_base, out_base = inputs[0], of_weights[0], outputs[0]
        index = add(scaled(row, counts[0]), head)  # of the head in its array
        for i, first in enumerate(itertools.accumulate(counts[:-1]), 1):
            is_own = arith.cmpi(arith.CmpIPredicate.uge, head, constant(first))
            select = lambda own, other, is_own=is_own: arith.select(is_own, own, other)  # noqa: E731
            own_index = add(scaled(row, counts[i]), arith.subi(head, constant(first)))
            x_base, weight_base, out_base, index = (
                select(inputs[i], x_base), select(of_weights[i], weight_base),
                select(outputs[i], out_base), select(own_index, index),
            )  # fmt: skip

        def place(base, offset, element):
            return mgpu_utils.getelementptr(base, [offset], element)

        def read(base, offset, element):
            value = llvm.load(ir.VectorType.get((width,), element), place(base, offset, element))
            return value if element == f32 else arith.extf(several, value)

        # Everything that a lane needs, its channels in both halves of the head.
        channels = [add(scaled(lane, width), constant(i)) for i in range(0, half, width * LANES)]
        start, table = scaled(index, head_dim), scaled(row, half)
        pairs = [
            tuple(read(x_base, add(add(start, channel), constant(side)), dtype) for side in (0, half))
            for channel in channels
        ]
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

        def rounded(value):
            if dtype == f32:
                return value
            return arith.truncf(ir.VectorType.get((width,), dtype), value)

        def normed(value, weight):
            value = rounded(arith.mulf(arith.mulf(value, scale), weight))
            return value if dtype == f32 else arith.extf(several, value)

        for channel, (a, b), (for_a, for_b), (cos, sin) in zip(channels, pairs, weights, tables, strict=True):
            a, b = normed(a, for_a), normed(b, for_b)
            new_a = arith.subf(arith.mulf(a, cos), arith.mulf(b, sin))
            new_b = arith.addf(arith.mulf(b, cos), arith.mulf(a, sin))
            for side, value in ((0, new_a), (half, new_b)):
                llvm.store(rounded(value), place(out_base, add(add(start, channel), constant(side)), dtype))
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
        yield CompileCase(
            name=f"norm rope M={rows} N=32+8 H={head_dim} {dtype} weights {weights}",
            function=functools.partial(run, epsilon=1e-6),
            avals=(
                [array((rows, n, head_dim), dtype) for n in (32, 8)],
                [array((head_dim,), weights)] * 2,
                table,
                table,
            ),
            required=(),
        )

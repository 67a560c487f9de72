"""Hopper kernel of the rotation: several rotations of the same few rows in one launch.

A CTA rotates one group of channels of at most 16 rows, for one of the rotations, in shared memory. A thread owns a pair
of channels in each step, so steps are in place and have one barrier between them. Its angles and pairs of all steps are
read before the first, for one latency in all. Stacks of layers are read where they lie.

A pair lies where the parameters say, which Pallas has no loads for: the body is written in MLIR. The interpreter runs
another body, which shares grid, tiles and layers with it.
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
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.rotation import xla
from pallas_kernels.rotation.turn import Turn

TILE = 16  # rows of a CTA
THREADS = 128
ACTIVATIONS = ("bfloat16", "float32")
PARAMETERS = ("float32", "bfloat16", "float16")


def unsupported(
    x: Any, turns: Sequence[Turn], *, group_size: int, inverse: bool = False, interpret: Any = None
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Takes what `run` takes."""
    if inverse:
        return "rotates forwards only"
    if str(x.dtype) not in ACTIVATIONS:
        return f"needs rows in {' or '.join(ACTIVATIONS)}; got {x.dtype}"
    if 2 * THREADS % group_size:
        return f"needs groups of a power of two up to {2 * THREADS} channels; got {group_size}"
    for turn in turns:
        if str(turn.pairs.dtype) not in ("int16", "int32"):
            return f"needs pairs in int16 or int32; got {turn.pairs.dtype}"
        for part in (turn.theta, turn.channel_scales):
            if part is not None and str(part.dtype) not in PARAMETERS:
                return f"needs angles and scales in {', '.join(PARAMETERS)}; got {part.dtype}"
    return None if interpret is not None else compat.missing_hopper()


@functools.partial(jax.jit, static_argnames=("group_size", "order", "interpret"))
def run(
    x: Float[Array, "M I"],
    turns: Sequence[Turn],
    *,
    group_size: int,
    order: tuple[int, ...] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M I"], ...]:
    """The rows `x` rotated by each of the turns, in the dtype of `x`; see `pairwise_rotations`.

    Args:
      x: rows.
      turns: stacks `[L, ...]`, each with the index of its layer; one outside is taken for the nearest.
      group_size: channels of a group.
      order: of the results within each group; None: as they were.
      interpret: runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: shapes or dtypes that the kernel does not take.
    """
    if (reason := unsupported(x, turns, group_size=group_size, interpret=interpret or object())) is not None:
        raise NotImplementedError(f"pairwise_rotation on Hopper {reason}")
    rows, channels = x.shape
    if rows == 0 or not turns:
        return tuple(x for _ in turns)
    tile = min(rows, TILE)
    padded = -(-rows // tile) * tile
    if padded != rows:
        x = jnp.pad(x, ((0, padded - rows), (0, 0)))

    def rotation(x_ref, turns, order_refs, *refs):
        *out_refs, buffer = refs
        group, nth, row = (lax.axis_index(name) for name in ("group", "nth", "tile"))
        columns = pl.ds(group * group_size, group_size)
        here = (pl.ds(row * tile, tile), columns)
        for i, (turn, out_ref) in enumerate(zip(turns, out_refs, strict=True)):

            @pl.when(nth == i)
            def _(turn=turn, out_ref=out_ref):
                layer = jnp.clip(turn.layer[0], 0, turn.pairs.shape[0] - 1)
                scales = None if turn.channel_scales is None else turn.channel_scales.at[layer, columns]
                theta = turn.theta.at[layer, :, pl.ds(group * (group_size // 2), group_size // 2)]
                own = Turn(theta, turn.pairs.at[layer, :, columns], scales, None)
                body = _interpreted if interpret is not None else _rotate
                body(x_ref.at[here], own, order_refs, out_ref.at[here], buffer)

    results = compat.kernel(
        rotation,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * len(turns),
        grid=(channels // group_size, len(turns), padded // tile),
        grid_names=("group", "nth", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((_whole(tile, group_size), group_size), jnp.float32)],
        interpret=interpret,
    )(
        x,
        [turn._replace(layer=jnp.asarray(turn.layer, jnp.int32).reshape(1)) for turn in turns],
        [] if order is None else [jnp.asarray(order, jnp.int32)],
    )
    return tuple(result[:rows] for result in results)


def _whole(rows: int, group_size: int) -> int:
    """Rows in whole sweeps of the threads over pairs."""
    at_once = 2 * THREADS // group_size
    return -(-rows // at_once) * at_once


def _interpreted(x_ref: Any, turn: Turn, order_refs: Any, out_ref: Any, buffer: Any) -> None:
    del buffer
    x = x_ref[...].astype(jnp.float32)
    if turn.channel_scales is not None:
        x = x * turn.channel_scales[...].astype(jnp.float32)
    theta, pairs = turn.theta[...].astype(jnp.float32), turn.pairs[...]
    rotated = xla.by_steps(x, theta, pairs, x.shape[-1], inverse=False).astype(out_ref.dtype)
    for order_ref in order_refs:
        rotated = rotated[:, order_ref[...]]
    out_ref[...] = rotated


def _rotate(x_ref: Any, turn: Turn, order_refs: Any, out_ref: Any, buffer_ref: Any) -> None:
    """One group of channels of some rows, all in global memory but for the buffer."""
    rows, size = x_ref.shape
    channels, steps = out_ref.ref.shape[1], turn.theta.shape[0]
    half, sweeps = size // 2, buffer_ref.shape[0] * size // (2 * THREADS)
    has_scales = turn.channel_scales is not None
    refs = [x_ref, turn.theta, turn.pairs, out_ref, buffer_ref]
    refs += [*([turn.channel_scales] if has_scales else []), *order_refs]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def body(ctx, x_ref, theta_ref, pairs_ref, out_ref, buffer_ref, *others):
        del ctx
        scales_ref, order_ref = others[0] if has_scales else None, others[-1] if order_refs else None
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant = lambda value: mgpu.c(value, i32)  # noqa: E731
        add = lambda a, b: arith.addi(a, constant(b) if isinstance(b, int) else b)  # noqa: E731
        scaled = lambda a, factor: arith.muli(a, constant(factor))  # noqa: E731
        thread = arith.remui(mgpu.thread_idx(), constant(THREADS))
        lane_row, pair = arith.divui(thread, constant(half)), arith.remui(thread, constant(half))
        base = {ref: mgpu_utils.memref_ptr(ref) for ref in (x_ref, theta_ref, pairs_ref, out_ref, buffer_ref)}

        def place(ref, offset):
            element = ir.MemRefType(ref.type).element_type
            return mgpu_utils.getelementptr(base[ref], [offset], element), element

        def read(ref, offset):
            """A number as float32 or int32."""
            pointer, element = place(ref, offset)
            value = llvm.load(element, pointer)
            if isinstance(element, ir.IntegerType):
                return value if element.width == 32 else arith.extsi(i32, value)
            return value if element == f32 else arith.extf(f32, value)

        # Angles and pairs of all steps. A cosine of the fast unit is right to 2^-20 within pi.
        turns = []
        for r in range(steps):
            first = add(scaled(pair, 2), r * channels)
            i, j = read(pairs_ref, first), read(pairs_ref, add(first, 1))
            turns.append((i, j, read(theta_ref, add(pair, r * (channels // 2)))))
        base |= {ref: mgpu_utils.memref_ptr(ref) for ref in others}

        # A thread's channels and rows of one sweep over the buffer, two of them; the last rows may repeat the last one.
        def elements():
            for n in range(2 * sweeps):
                index = add(thread, n * THREADS)
                row, channel = arith.divui(index, constant(size)), arith.remui(index, constant(size))
                yield index, add(scaled(arith.minui(row, constant(rows - 1)), channels), channel), channel

        loaded = []
        for index, offset, channel in elements():
            value = read(x_ref, offset)
            if scales_ref is not None:
                value = arith.mulf(value, read(scales_ref, channel))
            loaded.append((index, value))
        for index, value in loaded:
            llvm.store(value, place(buffer_ref, index)[0])

        for i, j, angle in turns:
            cos, sin = _cos_sin(angle)
            mgpu_utils.warpgroup_barrier()
            for sweep in range(sweeps):
                first = scaled(add(lane_row, sweep * (THREADS // half)), size)
                at_i, at_j = (place(buffer_ref, add(first, channel))[0] for channel in (i, j))
                a, b = llvm.load(f32, at_i), llvm.load(f32, at_j)
                llvm.store(arith.addf(arith.mulf(cos, a), arith.mulf(sin, b)), at_i)
                llvm.store(arith.subf(arith.mulf(cos, b), arith.mulf(sin, a)), at_j)
        mgpu_utils.warpgroup_barrier()

        shift = None
        for n, (index, offset, channel) in enumerate(elements()):
            if order_ref is not None:
                if size > THREADS or n == 0:  # else every element of a thread has the same channel
                    shift = arith.subi(read(order_ref, channel), channel)
                index = arith.addi(index, shift)
            pointer, element = place(out_ref, offset)
            value = llvm.load(f32, place(buffer_ref, index)[0])
            llvm.store(value if element == f32 else arith.truncf(element, value), pointer)
        return ()

    body(*refs)


def _cos_sin(angle: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of an angle of any size, by the fast unit, which is exact to 2^-20 between minus pi and pi."""
    f32 = ir.F32Type.get()
    turn = 2 * math.pi
    # Cody and Waite: multiples of a turn, whose leading part is exact, are taken off in two steps.
    lead = 6.28125
    ptx = f"""{{
        .reg .f32 n, t;
        mul.rn.f32 n, $1, {_hexadecimal(1 / turn)};
        cvt.rni.f32.f32 n, n;
        fma.rn.f32 t, n, {_hexadecimal(-lead)}, $1;
        fma.rn.f32 t, n, {_hexadecimal(lead - turn)}, t;
        NAME.approx.f32 $0, t;
    }}"""
    cos, sin = (llvm.inline_asm(f32, [angle], ptx.replace("NAME", name), "=f,f") for name in ("cos", "sin"))
    return cos, sin


def _hexadecimal(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{jnp.float32(value).view(jnp.uint32).item():08X}"


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: one and several rotations, few and many rows, dtypes of parameters."""
    from pallas_kernels.compile_gate import CompileCase

    array = jax.ShapeDtypeStruct
    shapes = [
        *((rows, 4096, 128, 3, "float16") for rows in (1, 8, 16, 256)),
        (1, 12288, 128, 1, "float16"),
        *((8, 4096, size, 1, dtype) for size, dtype in itertools.product((32, 64, 128, 256), ("float16", "float32"))),
    ]
    layers, steps = 4, 8
    for (rows, channels, group_size, turns, dtype), is_ordered in itertools.product(
        dict.fromkeys(shapes), (False, True)
    ):
        one = Turn(
            theta=array((layers, steps, channels // 2), dtype),
            pairs=array((layers, steps, channels), jnp.int16),
            channel_scales=array((layers, channels), dtype),
            layer=array((), jnp.int32),
        )
        yield CompileCase(
            name=f"rotation M={rows} I={channels} groups of {group_size} x{turns} {dtype}" + " ordered" * is_ordered,
            function=functools.partial(
                run, group_size=group_size, order=tuple(range(group_size))[::-1] if is_ordered else None
            ),
            avals=(array((rows, channels), jnp.bfloat16), [one] * turns),
            required=(),
        )

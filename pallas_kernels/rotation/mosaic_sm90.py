"""Hopper kernel of the rotation: several rotations of the same few rows in one launch.

A CTA rotates one group of channels of 4 or 16 rows, for one of the rotations, in shared memory. A thread owns a pair
of channels in each step, so steps are in place and have one barrier between them. Its angles and pairs of all steps are
read before the first, for one latency in all. Stacks of layers are read where they lie.

The rows may be normalised here too. Every CTA then sums the squares of its whole rows by itself, of fewer rows: that
reads them often, from the L2 cache, and saves two kernels.

A pair lies where the parameters say, which Pallas has no loads for: the body is written in MLIR. The interpreter runs
another body, which shares grid, tiles and layers with it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.rotation import xla
from pallas_kernels.rotation.source import Normed, Rows
from pallas_kernels.rotation.turn import Turn

TILES = (4, 16)  # rows of a CTA: where there are few CTAs, and where there are many
MANY_CTAS = 512
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
    if isinstance(x, Normed):
        if x.shape[-1] % THREADS:
            return f"needs norms over a multiple of {THREADS} channels; got {x.shape[-1]}"
        if str(x.weight.dtype) not in PARAMETERS:
            return f"needs weights of norms in {', '.join(PARAMETERS)}; got {x.weight.dtype}"
    for turn in turns:
        if turn.pairs is not None and str(turn.pairs.dtype) not in ("int16", "int32"):
            return f"needs pairs in int16 or int32; got {turn.pairs.dtype}"
        for part in (turn.theta, turn.channel_scales):
            if part is not None and str(part.dtype) not in PARAMETERS:
                return f"needs angles and scales in {', '.join(PARAMETERS)}; got {part.dtype}"
    return None if interpret is not None else compat.missing_hopper()


@functools.partial(jax.jit, static_argnames=("group_size", "interpret"))
def run(
    x: Rows,
    turns: Sequence[Turn],
    *,
    group_size: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M I"], ...]:
    """The rows `x` rotated by each of the turns, in the dtype of `x`; see `pairwise_rotations`.

    Args:
      x: rows `[M, I]`, or what they are made of.
      turns: stacks `[L, ...]`, each with the index of its layer; one outside is taken for the nearest.
      group_size: channels of a group.
      interpret: runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: shapes or dtypes that the kernel does not take.
    """
    if (reason := unsupported(x, turns, group_size=group_size, interpret=interpret or object())) is not None:
        raise NotImplementedError(f"pairwise_rotation on Hopper {reason}")
    rows, channels = x.shape
    if rows == 0 or not turns:
        return tuple(jnp.zeros(x.shape, x.dtype) for _ in turns)
    tile = min(rows, _rows_of_tile(x, group_size, len(turns)))
    padded = -(-rows // tile) * tile
    if padded != rows:
        pad = lambda x: jnp.pad(x, ((0, padded - rows), (0, 0)))  # noqa: E731
        x = x.on_rows(pad) if isinstance(x, Normed) else pad(x)

    def rotation(x_refs, turns, *refs):
        *out_refs, buffer, sums = refs
        group, nth, row = (lax.axis_index(name) for name in ("group", "nth", "tile"))
        columns = pl.ds(group * group_size, group_size)
        here = (pl.ds(row * tile, tile), columns)
        source = _Tile.of(x_refs, pl.ds(row * tile, tile), columns, sums)
        for i, (turn, out_ref) in enumerate(zip(turns, out_refs, strict=True)):

            @pl.when(nth == i)
            def _(turn=turn, out_ref=out_ref):
                own = Turn(None, None)
                for name, part in turn._replace(layer=None)._asdict().items():
                    if part is not None:
                        own_part = pl.ds(group * (group_size // 2), group_size // 2) if name == "theta" else columns
                        middle = () if name == "channel_scales" else (slice(None),)
                        layer = jnp.clip(turn.layer[0], 0, part.shape[0] - 1) if part.shape[0] > 1 else jnp.int32(0)
                        own = own._replace(**{name: part.at[layer, *middle, own_part]})
                body = _interpreted if interpret is not None else _rotate
                body(source, own, out_ref.at[here], buffer)

    results = compat.kernel(
        rotation,
        out_type=[jax.ShapeDtypeStruct((padded, channels), x.dtype)] * len(turns),
        grid=(channels // group_size, len(turns), padded // tile),
        grid_names=("group", "nth", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((_whole(tile, group_size), group_size), jnp.float32),
            plgpu.SMEM((THREADS // 32, tile), jnp.float32),
        ],
        interpret=interpret,
    )(
        x,
        [turn._replace(layer=jnp.asarray(turn.layer, jnp.int32).reshape(1)) for turn in turns],
    )
    return tuple(result[:rows] for result in results)


def _rows_of_tile(x: Rows, group_size: int, turns: int) -> int:
    """Few where all CTAs find room at once, or each reads its whole rows for their norms."""
    few, many = TILES
    ctas = -(-x.shape[0] // many) * x.shape[1] // group_size * turns
    return many if ctas >= MANY_CTAS and not isinstance(x, Normed) else few


def _whole(rows: int, group_size: int) -> int:
    """Rows in whole sweeps of the threads over pairs."""
    at_once = 2 * THREADS // group_size
    return -(-rows // at_once) * at_once


class _Tile(NamedTuple):
    """Some rows of one group of channels, all in global memory but for the sums; the rest is of a norm."""

    x: Any  # `[rows, group size]`
    weight: Any = None  # of the group
    whole: Any = None  # the rows with all channels
    sums: Any = None  # shared memory for the sums of each warp
    epsilon: float = 0.0

    @classmethod
    def of(cls, refs: Any, rows: Any, columns: Any, sums: Any) -> "_Tile":
        if isinstance(refs, Normed):
            return cls(refs.x.at[rows, columns], refs.weight.at[columns], refs.x.at[rows], sums, refs.epsilon)
        return cls(refs.at[rows, columns])


def _interpreted(tile: _Tile, turn: Turn, out_ref: Any, buffer: Any) -> None:
    del buffer
    x = tile.x[...]
    if tile.whole is not None:
        x32 = tile.whole[...].astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + tile.epsilon)
        x = (x.astype(jnp.float32) * scale * tile.weight[...].astype(jnp.float32)).astype(x.dtype)
    x = x.astype(jnp.float32)
    if turn.channel_scales is not None:
        x = x * turn.channel_scales[...].astype(jnp.float32)
    if turn.pairs is not None:
        theta, pairs = turn.theta[...].astype(jnp.float32), turn.pairs[...]
        x = xla.by_steps(x, theta, pairs, x.shape[-1], inverse=False)
    out_ref[...] = x.astype(out_ref.dtype)


def _rotate(tile: _Tile, turn: Turn, out_ref: Any, buffer_ref: Any) -> None:
    """One group of channels of some rows."""
    rows, size = tile.x.shape
    channels, steps = out_ref.ref.shape[1], 0 if turn.pairs is None else turn.pairs.shape[0]
    half, sweeps = size // 2, buffer_ref.shape[0] * size // (2 * THREADS)
    refs = tile._asdict() | turn._asdict() | {"epsilon": None, "out": out_ref, "buffer": buffer_ref}
    names = [name for name, ref in refs.items() if ref is not None]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(names))
    def body(ctx, *given):
        del ctx
        arrays = dict(zip(names, given, strict=True))
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant = lambda value: mgpu.c(value, i32)  # noqa: E731
        add = lambda a, b: arith.addi(a, constant(b) if isinstance(b, int) else b)  # noqa: E731
        scaled = lambda a, factor: arith.muli(a, constant(factor))  # noqa: E731
        thread = arith.remui(mgpu.thread_idx(), constant(THREADS))
        lane_row, pair = arith.divui(thread, constant(half)), arith.remui(thread, constant(half))
        base = {name: mgpu_utils.memref_ptr(ref) for name, ref in arrays.items()}
        element_of = {name: ir.MemRefType(ref.type).element_type for name, ref in arrays.items()}

        def place(name, offset):
            return mgpu_utils.getelementptr(base[name], [offset], element_of[name])

        def read(name, offset):
            """A number as float32 or int32."""
            element = element_of[name]
            value = llvm.load(element, place(name, offset))
            if isinstance(element, ir.IntegerType):
                return value if element.width == 32 else arith.extsi(i32, value)
            return value if element == f32 else arith.extf(f32, value)

        def rounded(value):
            """As an array of the dtype of the rows would have it."""
            element = element_of["x"]
            return value if element == f32 else arith.extf(f32, arith.truncf(element, value))

        # Angles and pairs of all steps. A cosine of the fast unit is right to 2^-20 within pi.
        turns = []
        for r in range(steps):
            first = add(scaled(pair, 2), r * channels)
            i, j = read("pairs", first), read("pairs", add(first, 1))
            turns.append((i, j, read("theta", add(pair, r * (channels // 2)))))

        # A thread's channels and rows of one sweep over the buffer, two of them; the last rows may repeat the last one.
        def elements():
            for n in range(2 * sweeps):
                index = add(thread, n * THREADS)
                row, channel = arith.divui(index, constant(size)), arith.remui(index, constant(size))
                yield index, add(scaled(arith.minui(row, constant(rows - 1)), channels), channel), channel

        loaded = [read("x", offset) for _, offset, _ in elements()]
        if "whole" in names:
            factors = _norm_factors(place, element_of["whole"], thread, rows, channels, tile.epsilon)
            for n, (index, _, channel) in enumerate(elements()):
                row = arith.minui(arith.divui(index, constant(size)), constant(rows - 1))
                factor = factors[0]
                for r in range(1, rows):
                    is_row = arith.cmpi(arith.CmpIPredicate.eq, row, constant(r))
                    factor = arith.select(is_row, factors[r], factor)
                loaded[n] = rounded(arith.mulf(arith.mulf(loaded[n], factor), read("weight", channel)))
        for (index, _, channel), value in zip(elements(), loaded, strict=True):
            if "channel_scales" in names:
                value = arith.mulf(value, read("channel_scales", channel))
            llvm.store(value, place("buffer", index))

        for i, j, angle in turns:
            cos, sin = _cos_sin(angle)
            mgpu_utils.warpgroup_barrier()
            for sweep in range(sweeps):
                first = scaled(add(lane_row, sweep * (THREADS // half)), size)
                at_i, at_j = (place("buffer", add(first, channel)) for channel in (i, j))
                a, b = llvm.load(f32, at_i), llvm.load(f32, at_j)
                llvm.store(arith.addf(arith.mulf(cos, a), arith.mulf(sin, b)), at_i)
                llvm.store(arith.subf(arith.mulf(cos, b), arith.mulf(sin, a)), at_j)
        mgpu_utils.warpgroup_barrier()

        for index, offset, _ in elements():
            value = llvm.load(f32, place("buffer", index))
            element = element_of["out"]
            llvm.store(value if element == f32 else arith.truncf(element, value), place("out", offset))
        return ()

    body(*(refs[name] for name in names))


def _norm_factors(
    place: Callable, element: ir.Type, thread: ir.Value, rows: int, channels: int, epsilon: float
) -> list[ir.Value]:
    """`1 / sqrt(mean(x²) + epsilon)` of each row, by all threads: their own shares, those of a warp, of all warps."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    vector_size = math.gcd(channels // THREADS, 16 // (mgpu_utils.bitwidth(element) // 8))
    per_thread = channels // (THREADS * vector_size)
    narrow, wide = (ir.VectorType.get((vector_size,), kind) for kind in (element, f32))
    total = [mgpu.c(0.0, f32)] * rows
    for row, n in itertools.product(range(rows), range(per_thread)):
        first = arith.muli(arith.addi(thread, mgpu.c(n * THREADS, i32)), mgpu.c(vector_size, i32))
        pointer = place("whole", arith.addi(first, mgpu.c(row * channels, i32)))
        values = llvm.load(narrow, pointer, alignment=vector_size * mgpu_utils.bitwidth(element) // 8)
        values = values if element == f32 else arith.extf(wide, values)
        for i in range(vector_size):
            value = vector.extract(values, dynamic_position=[], static_position=[i])
            total[row] = arith.addf(total[row], arith.mulf(value, value))
    for row, distance in itertools.product(range(rows), (16, 8, 4, 2, 1)):
        total[row] = arith.addf(total[row], mgpu_utils.shfl_bfly(total[row], distance))
    warp, warps = arith.divui(thread, mgpu.c(32, i32)), THREADS // 32
    for row in range(rows):  # every lane writes what all of the warp have
        llvm.store(total[row], place("sums", arith.addi(arith.muli(warp, mgpu.c(rows, i32)), mgpu.c(row, i32))))
    mgpu_utils.warpgroup_barrier()
    factors = []
    for row in range(rows):
        parts = [llvm.load(f32, place("sums", mgpu.c(w * rows + row, i32))) for w in range(warps)]
        mean = arith.mulf(functools.reduce(arith.addf, parts), mgpu.c(1 / channels, f32))
        shifted = arith.addf(mean, mgpu.c(epsilon, f32))
        factors.append(llvm.inline_asm(f32, [shifted], "rsqrt.approx.f32 $0, $1;", "=f,f"))
    return factors


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
    return f"0f{np.float32(value).view(np.uint32):08X}"


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: one and several rotations, few and many rows, dtypes of parameters, norms."""
    from pallas_kernels.compile_gate import CompileCase

    array = jax.ShapeDtypeStruct
    shapes = [
        *((rows, 4096, 128, 3, "float16") for rows in (1, 8, 16, 256)),
        (1, 12288, 128, 1, "float16"),
        *((8, 4096, size, 1, dtype) for size, dtype in itertools.product((32, 64, 128, 256), ("float16", "float32"))),
    ]
    layers, steps = 4, 8

    def case(rows, channels, group_size, turns, dtype, *, is_normed=False, steps=steps):
        one = Turn(None, None, layer=array((), jnp.int32))
        if steps:
            one = Turn(
                theta=array((layers, steps, channels // 2), dtype),
                pairs=array((layers, steps, channels), jnp.int16),
                channel_scales=array((layers, channels), dtype),
                layer=array((), jnp.int32),
            )
        x = array((rows, channels), jnp.bfloat16)
        return CompileCase(
            name=f"rotation M={rows} I={channels} groups of {group_size} x{turns} {steps} steps {dtype}"
            + " normed" * is_normed,
            function=functools.partial(run, group_size=group_size),
            avals=(Normed(x, array((channels,), jnp.bfloat16), 1e-6) if is_normed else x, [one] * turns),
            required=(),
        )

    for shape in dict.fromkeys(shapes):
        yield case(*shape)
    for rows in (1, 16):
        yield case(rows, 4096, 128, 3, "float16", is_normed=True)
        yield case(rows, 4096, 128, 1, "float16", is_normed=True, steps=0)
    yield case(8, 2560, 64, 1, "float16", is_normed=True)

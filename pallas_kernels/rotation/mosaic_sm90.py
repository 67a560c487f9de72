"""Hopper kernel of the rotation: several rotations of the same few rows in one launch.

A CTA rotates one group of channels of 4 or 16 rows, for one of the rotations, in shared memory. A thread owns a pair
of channels in each step, so steps are in place and have one barrier between them. Its angles and pairs of all steps are
read before the first, for one latency in all. Stacks of layers are read where they lie.

The rows may be made here too, of arrays some of which may be in parts. Those that are `Gated` a CTA makes by itself. Of
those that are `Normed`, norms of sums, the CTAs of a cluster share the channels of a few rows: each adds up its own and
their squares, and tells the others the latter through shared memory.

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
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.partial import MaybePartial, Partial
from pallas_kernels.rotation import xla
from pallas_kernels.rotation.source import Gated, Normed, Source, operands
from pallas_kernels.rotation.turn import Turn

TILES = (4, 16)  # rows of a CTA: where there are few CTAs, and where there are many
MANY_CTAS = 512
NORM_TILES = (1, 2, 4)  # rows of a cluster: the fewest that find room at once
CTAS_AT_ONCE = 528  # four to a multiprocessor
CLUSTERS = (8, 4, 2, 1)  # CTAs that share the channels of a row
THREADS = 128
MAX_SPAN = 2048  # channels of a row that a CTA may have; a thread holds its part in registers
ACTIVATIONS = ("bfloat16", "float32")
PARAMETERS = ("float32", "bfloat16", "float16")


def unsupported(
    x: Source, turns: Sequence[Turn], *, group_size: int, inverse: bool = False, interpret: Any = None
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Takes what `run` takes."""
    if inverse:
        return "rotates forwards only"
    if str(x.dtype) not in ACTIVATIONS:
        return f"needs rows in {' or '.join(ACTIVATIONS)}; got {x.dtype}"
    if 2 * THREADS % group_size:
        return f"needs groups of a power of two up to {2 * THREADS} channels; got {group_size}"
    if isinstance(x, Normed):
        if str(x.weight.dtype) not in PARAMETERS:
            return f"needs weights of norms in {', '.join(PARAMETERS)}; got {x.weight.dtype}"
        if (span := x.shape[-1] // _cluster(x.shape[-1], group_size)) > MAX_SPAN:
            return f"needs norms of up to {MAX_SPAN} channels for each CTA of a cluster; got {span}"
    for turn in turns:
        if turn.pairs is not None and str(turn.pairs.dtype) not in ("int16", "int32"):
            return f"needs pairs in int16 or int32; got {turn.pairs.dtype}"
        for part in (turn.theta, turn.channel_scales):
            if part is not None and str(part.dtype) not in PARAMETERS:
                return f"needs angles and scales in {', '.join(PARAMETERS)}; got {part.dtype}"
    return None if interpret is not None else compat.missing_hopper()


@functools.partial(jax.jit, static_argnames=("group_size", "tile", "interpret"))
def run(
    x: Source,
    turns: Sequence[Turn],
    *,
    group_size: int,
    tile: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "M I"], ...]:
    """The rows `x` rotated by each of the turns, in the dtype of `x`; of `Normed` ones first their sum.

    Args:
      x: rows `[M, I]`, or what they are made of.
      turns: stacks `[L, ...]`, each with the index of its layer; one outside is taken for the nearest.
      group_size: channels of a group.
      tile: rows of a CTA; None: by the shape.
      interpret: runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: shapes or dtypes that the kernel does not take.
      ValueError: parts do not end with a whole tile.
    """
    if (reason := unsupported(x, turns, group_size=group_size, interpret=interpret or object())) is not None:
        raise NotImplementedError(f"pairwise_rotation on Hopper {reason}")
    rows, channels = x.shape
    normed = x if isinstance(x, Normed) else None
    if rows == 0 or not turns:
        first = () if normed is None else (normed.total(),)
        return first + tuple(jnp.zeros(x.shape, x.dtype) for _ in turns)
    cluster = 1 if normed is None else _cluster(channels, group_size)
    span = group_size if normed is None else channels // cluster
    tile = min(rows, tile or _rows_of_tile(x, group_size, len(turns)))
    padded = -(-rows // tile) * tile
    has_sum = normed is not None and normed.y is not None

    given = operands(x)
    columns = {name: array.first if isinstance(array, Partial) else 0 for name, array in given.items()}

    def whole(array: MaybePartial) -> Array:
        """In whole tiles of rows, as parts are."""
        if isinstance(array, Partial):
            if (least := array.parts.shape[1]) < padded:
                raise ValueError(f"tiles of {tile} rows need {padded} rows of parts; got {least}")
            return array.parts
        return array if padded == rows else jnp.pad(array, ((0, padded - rows), (0, 0)))

    arrays = {name: array if name == "weight" else whole(array) for name, array in given.items()}

    def rotation(refs, turns, *rest):
        *out_refs, buffer, sums = rest
        nth, row, at = (lax.axis_index(name) for name in ("nth", "tile", "span"))
        tile_rows = pl.ds(row * tile, tile)

        def part(name: str, first: Any, width: int) -> Any:
            """Channels of the rows of an array, or of its parts."""
            if (ref := refs.get(name)) is None:
                return None
            every = (slice(None),) if ref.ndim == 3 else ()
            return ref.at[*every, tile_rows, pl.ds(columns[name] + first, width)]

        tiled = _Tile(
            x=part("x", at * span, span),
            y=part("y", at * span, span),
            whole=(part("x", 0, channels), part("y", 0, channels)),
            weight=None if normed is None else refs["weight"].at[pl.ds(at * span, span)],
            epsilon=0.0 if normed is None else normed.epsilon,
            cluster=cluster,
            sums=sums,
        )
        here = (tile_rows, pl.ds(at * span, span))
        for i, turn in enumerate(turns):

            @pl.when(nth == i)
            def _(i=i, turn=turn):
                own = Turn(None, None)
                for name, part in turn._replace(layer=None)._asdict().items():
                    if part is not None:
                        width = span // 2 if name == "theta" else span
                        middle = () if name == "channel_scales" else (slice(None),)
                        layer = jnp.clip(turn.layer[0], 0, part.shape[0] - 1) if part.shape[0] > 1 else jnp.int32(0)
                        own = own._replace(**{name: part.at[layer, *middle, pl.ds(at * width, width)]})
                total_ref = out_refs[0].at[here] if has_sum and i == 0 else None
                body = _interpreted if interpret is not None else _rotate
                body(tiled, own, group_size, out_refs[has_sum + i].at[here], total_ref, buffer)

    grid: dict[str, int] = {"nth": len(turns), "tile": padded // tile}
    options: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("span",)}
    if normed is None:
        grid, options = {"span": channels // span} | grid, {}
    elif cluster == 1:
        grid, options = {"span": 1} | grid, {}
    results = compat.kernel(
        rotation,
        out_type=[jax.ShapeDtypeStruct((padded, channels), x.dtype)] * (has_sum + len(turns)),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((_whole(tile, span), span), jnp.float32),
            plgpu.SMEM((THREADS // 32 + cluster, tile), jnp.float32),
        ],
        interpret=interpret,
        **options,
    )(
        arrays,
        [turn._replace(layer=jnp.asarray(turn.layer, jnp.int32).reshape(1)) for turn in turns],
    )
    results = tuple(result[:rows] for result in results)
    return results if normed is None or has_sum else (normed.x, *results)


def _rows_of_tile(x: Source, group_size: int, turns: int) -> int:
    """Few where all CTAs find room at once, or where parts end with a tile of few."""
    rows, channels = x.shape
    if isinstance(x, Normed):
        ctas = _cluster(channels, group_size) * turns
        return next((tile for tile in NORM_TILES if -(-rows // tile) * ctas <= CTAS_AT_ONCE), NORM_TILES[-1])
    few, many = TILES
    if any(isinstance(array, Partial) for array in operands(x).values()):
        return few
    return many if -(-rows // many) * channels // group_size * turns >= MANY_CTAS else few


def _cluster(channels: int, group_size: int) -> int:
    """CTAs that share the channels of a row, in whole groups and such that threads have equally many of them."""
    groups = channels // group_size
    return next((n for n in CLUSTERS if groups % n == 0 and channels // n % THREADS == 0), 1)


def _whole(rows: int, span: int) -> int:
    """Rows in whole sweeps of the threads over pairs."""
    at_once = 2 * THREADS // math.gcd(span, 2 * THREADS)
    return -(-rows // at_once) * at_once


class _Tile(NamedTuple):
    """Some rows of a CTA's span of channels, all in global memory but for the sums."""

    x: Any  # `[rows, span]`, or parts `[J, rows, span]`; a gate
    y: Any  # the same, of a summand, or of what is gated; None: neither
    whole: tuple[Any, Any]  # x and y with all channels, for the interpreter, which has no exchange
    weight: Any  # of a norm; None: none
    epsilon: float
    cluster: int
    sums: Any  # shared memory for the sums of each warp, then of each CTA of the cluster, of each row

    @property
    def is_gated(self) -> bool:
        return self.y is not None and self.weight is None


def _interpreted(tile: _Tile, turn: Turn, group_size: int, out_ref: Any, total_ref: Any, buffer: Any) -> None:
    del buffer
    dtype = out_ref.dtype

    def read(ref: Any) -> Array:
        x = ref[...]
        return (x if x.ndim == 2 else functools.reduce(jnp.add, x).astype(dtype)).astype(jnp.float32)

    def total(x_ref: Any, y_ref: Any) -> Array:
        x = read(x_ref)
        if tile.is_gated:
            return (x * (1 / (1 + jnp.exp(-x))) * read(y_ref)).astype(dtype)
        return (x if y_ref is None else x + read(y_ref)).astype(dtype)

    x = total(tile.x, tile.y)
    if total_ref is not None:
        total_ref[...] = x
    if tile.weight is not None:
        x32 = total(*tile.whole).astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=1, keepdims=True) + tile.epsilon)
        x = (x.astype(jnp.float32) * scale * tile.weight[...].astype(jnp.float32)).astype(x.dtype)
    x = x.astype(jnp.float32)
    if turn.channel_scales is not None:
        x = x * turn.channel_scales[...].astype(jnp.float32)
    if turn.pairs is not None:
        theta, pairs = turn.theta[...].astype(jnp.float32), turn.pairs[...]
        x = xla.by_steps(x, theta, pairs, group_size, inverse=False)
    out_ref[...] = x.astype(out_ref.dtype)


def _rotate(tile: _Tile, turn: Turn, group_size: int, out_ref: Any, total_ref: Any, buffer_ref: Any) -> None:
    """A span of channels of some rows, one or several whole groups."""
    rows, span = out_ref.shape
    channels, steps = out_ref.ref.shape[1], 0 if turn.pairs is None else turn.pairs.shape[0]
    padded = buffer_ref.shape[0]
    sweeps = padded * span // (2 * THREADS)
    refs = {"x": tile.x, "y": tile.y, "weight": tile.weight, "sums": tile.sums} | turn._asdict()
    refs |= {"out": out_ref, "total": total_ref, "buffer": buffer_ref}
    names = [name for name, ref in refs.items() if ref is not None]
    is_normed = tile.weight is not None

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(names))
    def body(ctx, *given):
        del ctx
        arrays = dict(zip(names, given, strict=True))
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant = lambda value: mgpu.c(value, i32)  # noqa: E731
        add = lambda a, b: arith.addi(a, constant(b) if isinstance(b, int) else b)  # noqa: E731
        scaled = lambda a, factor: arith.muli(a, constant(factor))  # noqa: E731
        thread = arith.remui(mgpu.thread_idx(), constant(THREADS))
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

        def write(name, offset, value):
            element = element_of[name]
            llvm.store(value if element == f32 else arith.truncf(element, value), place(name, offset))

        def rounded(value):
            """As an array of the dtype of the rows would have it."""
            element = element_of["out"]
            return value if element == f32 else arith.extf(f32, arith.truncf(element, value))

        # A thread's pairs: their row in the buffer, the first channel of their group, angles and pairs of all steps. A
        # sweep has the parameters of one before it, if it has the same channels of other rows. A cosine of the fast
        # unit is right to 2^-20 within pi.
        half, period = group_size // 2, math.lcm(span // 2, THREADS) // THREADS
        own_pairs = []
        for sweep in range(min(sweeps, period) if steps else 0):
            pair = arith.remui(add(thread, sweep * THREADS), constant(span // 2))
            group = scaled(arith.divui(pair, constant(half)), group_size)
            of_steps = []
            for r in range(steps):
                first = add(scaled(pair, 2), r * channels)
                i, j = (add(group, read("pairs", add(first, side))) for side in (0, 1))
                of_steps.append((i, j, read("theta", add(pair, r * (channels // 2)))))
            own_pairs.append(of_steps)

        # A thread's numbers in the buffer, and where they are in global memory; the last rows may repeat the last one.
        def elements():
            for n in range(2 * sweeps):
                index = add(thread, n * THREADS)
                row, channel = arith.divui(index, constant(span)), arith.remui(index, constant(span))
                own_row = arith.minui(row, constant(rows - 1))
                yield n, index, row, own_row, channel, add(scaled(own_row, channels), channel)

        def numbers(name):
            """A thread's own, of an array or of all its parts."""
            *parts, all_rows, columns = refs[name].ref.shape
            for *_, own_row, channel, _ in elements():
                first = add(scaled(own_row, columns), channel)
                own = [read(name, add(first, j * all_rows * columns)) for j in range(math.prod(parts))]
                yield rounded(functools.reduce(arith.addf, own)) if parts else own[0]

        loaded = [*numbers("x")]
        if tile.is_gated:
            loaded = [rounded(arith.mulf(_silu(x), y)) for x, y in zip(loaded, [*numbers("y")], strict=True)]
        elif "y" in names:
            loaded = [rounded(arith.addf(x, y)) for x, y in zip(loaded, [*numbers("y")], strict=True)]
        if "total" in names:
            for n, *_, offset in elements():
                write("total", offset, loaded[n])
        if is_normed:
            squares = [mgpu.c(0.0, f32)] * rows
            for n, _, row, *_ in elements():
                square = arith.mulf(loaded[n], loaded[n])
                for r in range(rows):
                    if span % THREADS == 0:  # all threads are in one row
                        if n * THREADS // span == r:
                            squares[r] = arith.addf(squares[r], square)
                        continue
                    is_row = arith.cmpi(arith.CmpIPredicate.eq, row, constant(r))
                    squares[r] = arith.addf(squares[r], arith.select(is_row, square, mgpu.c(0.0, f32)))
            factors = _norm_factors(place, squares, thread, channels, tile.epsilon, tile.cluster)
            for n, _, _, own_row, channel, _ in elements():
                factor = factors[0]
                for r in range(1, rows):
                    is_row = arith.cmpi(arith.CmpIPredicate.eq, own_row, constant(r))
                    factor = arith.select(is_row, factors[r], factor)
                loaded[n] = rounded(arith.mulf(arith.mulf(loaded[n], factor), read("weight", channel)))
        for n, _, _, _, channel, _ in elements():
            if "channel_scales" in names:
                loaded[n] = arith.mulf(loaded[n], read("channel_scales", channel))

        if not steps:
            for n, *_, offset in elements():
                write("out", offset, loaded[n])
            return ()

        for n, index, *_ in elements():
            llvm.store(loaded[n], place("buffer", index))
        for r in range(steps):
            turns = [(i, j, *_cos_sin(angle)) for i, j, angle in (of_steps[r] for of_steps in own_pairs)]
            mgpu_utils.warpgroup_barrier()
            for sweep in range(sweeps):
                i, j, cos, sin = turns[sweep % period]
                row = arith.divui(add(thread, sweep * THREADS), constant(span // 2))
                at_i, at_j = (place("buffer", add(scaled(row, span), channel)) for channel in (i, j))
                a, b = llvm.load(f32, at_i), llvm.load(f32, at_j)
                llvm.store(arith.addf(arith.mulf(cos, a), arith.mulf(sin, b)), at_i)
                llvm.store(arith.subf(arith.mulf(cos, b), arith.mulf(sin, a)), at_j)
        mgpu_utils.warpgroup_barrier()

        for _, index, *_, offset in elements():
            write("out", offset, llvm.load(f32, place("buffer", index)))
        return ()

    body(*(refs[name] for name in names))


def _norm_factors(
    place: Callable, squares: list[ir.Value], thread: ir.Value, channels: int, epsilon: float, cluster: int
) -> list[ir.Value]:
    """`1 / sqrt(mean(x²) + epsilon)` of each row, of a thread's squares: those of a warp, of all, of all CTAs."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda value: mgpu.c(value, i32)  # noqa: E731
    rows, warps = len(squares), THREADS // 32
    warp = arith.divui(thread, constant(32))
    for r in range(rows):
        for distance in (16, 8, 4, 2, 1):
            squares[r] = arith.addf(squares[r], mgpu_utils.shfl_bfly(squares[r], distance))
        # Every lane writes what all of the warp have.
        llvm.store(squares[r], place("sums", arith.addi(arith.muli(warp, constant(rows)), constant(r))))
    mgpu_utils.warpgroup_barrier()

    def sums(first: int, count: int) -> list[ir.Value]:
        """Of each row, what so many lines of shared memory add up to."""
        lines = range(first, first + count)
        parts = [[llvm.load(f32, place("sums", constant(line * rows + r))) for line in lines] for r in range(rows)]
        return [functools.reduce(arith.addf, own) for own in parts]

    totals = sums(0, warps)
    if cluster > 1:
        # Thread n tells CTA n of the cluster. All of them run by now: the kernel began with a barrier of the cluster.
        void = ir.Type.parse("!llvm.void")
        lines = llvm.ptrtoint(i32, place("sums", constant(warps * rows)))
        for r, total in enumerate(totals):
            ptx = f"""{{
                .reg .pred p;
                .reg .b32 rank, here, there;
                setp.lt.u32 p, $0, {cluster};
                mov.u32 rank, %cluster_ctarank;
                mad.lo.u32 here, rank, {4 * rows}, $1;
                @p mapa.shared::cluster.u32 there, here, $0;
                @p st.shared::cluster.f32 [there+{4 * r}], $2;
            }}"""
            llvm.inline_asm(void, [thread, lines, total], ptx, "r,r,f,~{memory}", has_side_effects=True)
        barrier = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        llvm.inline_asm(void, [], barrier, "~{memory}", has_side_effects=True)
        totals = sums(warps, cluster)
    factors = []
    for total in totals:
        mean = arith.mulf(total, mgpu.c(1 / channels, f32))
        shifted = arith.addf(mean, mgpu.c(epsilon, f32))
        factors.append(llvm.inline_asm(f32, [shifted], "rsqrt.approx.f32 $0, $1;", "=f,f"))
    return factors


def _silu(x: ir.Value) -> ir.Value:
    f32 = ir.F32Type.get()
    power = arith.mulf(x, mgpu.c(-math.log2(math.e), f32))
    power = llvm.inline_asm(f32, [power], "ex2.approx.f32 $0, $1;", "=f,f")
    return arith.divf(x, arith.addf(power, mgpu.c(1.0, f32)))


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

    def case(rows, channels, group_size, turns, dtype, *, steps=steps, source=""):
        one = Turn(None, None, layer=array((), jnp.int32))
        if steps:
            one = Turn(
                theta=array((layers, steps, channels // 2), dtype),
                pairs=array((layers, steps, channels), jnp.int16),
                channel_scales=array((layers, channels), dtype),
                layer=array((), jnp.int32),
            )
        x: Any = array((rows, channels), jnp.bfloat16)
        if source == "gated":
            parts = array((2, -(-rows // 8) * 8, 2 * channels), jnp.float32)
            form = (channels, (rows, channels), jnp.dtype(jnp.bfloat16))
            x = Gated(Partial(parts, 0, *form), Partial(parts, channels, *form))
        elif source:
            y = None
            if source == "normed sum":
                parts = array((8, -(-rows // 8) * 8, channels), jnp.float32)
                y = Partial(parts, 0, channels, (rows, channels), jnp.dtype(jnp.bfloat16))
            x = Normed(x, array((channels,), jnp.bfloat16), 1e-6, y)
        name = f"rotation M={rows} I={channels} groups of {group_size} x{turns} {steps} steps {dtype} {source}"
        return CompileCase(
            name=name.rstrip(),
            function=functools.partial(run, group_size=group_size),
            avals=(x, [one] * turns),
            required=(),
        )

    for shape in dict.fromkeys(shapes):
        yield case(*shape)
    for rows in (1, 16):
        yield case(rows, 4096, 128, 3, "float16", source="normed")
        yield case(rows, 4096, 128, 3, "float16", source="normed sum")
        yield case(rows, 4096, 128, 1, "float16", source="normed sum", steps=0)
        yield case(rows, 12288, 128, 1, "float16", source="gated")
    yield case(8, 2560, 64, 1, "float16", source="normed sum")
    yield case(64, 5120, 128, 3, "float16", source="normed sum")

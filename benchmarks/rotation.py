"""Rotations of activations on a Hopper GPU: first that they are right, then how long they take.

    python -m benchmarks.rotation check      # every kind of call against NumPy in float64
    python -m benchmarks.rotation time       # against XLA's paths, in the same process
    python -m benchmarks.rotation time --sweep   # CTAs of few and of many rows against each other

Needs JAX with CUDA and NumPy. One compiled call rotates with the layers of a stack one after another, by the layer
index; the rows of a layer are made from the result of the one before by one elementwise operation. `device us` is the
profiler's sum over all kernels of one layer.

What to expect: parameters of one rotation of 4096 channels are 16 KB of angles and 64 KB of pairs for each of two
bytes, eight steps of two shared memory accesses and a barrier take about 1 us, reading what the first step needs 1 us,
and starting a kernel 2 us: 3 to 5 us for up to 16 rows, for one rotation as for three. Rows that the kernel makes of a
norm cost it an exchange between the CTAs of a cluster, about 1 us, where XLA has two kernels of 1.2 us more; eight
parts of a sum are 128 KB a row from the L2 cache, 0.1 us more.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from pallas_kernels import compat
from pallas_kernels.partial import Partial
from pallas_kernels.rotation import (
    Gated,
    Normed,
    Turn,
    gated_rotations,
    mosaic_sm90,
    normed_rotations,
    pairwise_rotations,
)

Rows = Any  # Array | Normed | Gated

SOURCES = ("normed", "normed sum")
TILES = (1, 2, 4, 8, 16)
LIMITS = {"float32": 1e-5, "bfloat16": 3e-3}  # relative error in the L2 norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: M rows of I channels, several rotations."""

    rows: int = 1
    channels: int = 4096
    group_size: int = 128
    steps: int = 8
    rotations: int = 1
    dtype: str = "bfloat16"
    layers: int = 2
    source: str = ""  # of the rows, if the kernel makes them: "normed", "normed sum", "gated"
    parts: int = 8  # of the second summand or of both factors; 0: an array

    @property
    def name(self) -> str:
        name = f"M={self.rows} I={self.channels} x{self.rotations} {self.steps} steps in groups of {self.group_size}"
        return f"{name} {self.dtype} {self.source}".rstrip()

    def arguments(self) -> tuple[Rows, list[Turn]]:
        """Rows, and turns of float16 parameters without the index of a layer; without steps they have none."""
        rng = np.random.default_rng(0)

        def one() -> Turn:
            if not self.steps:
                return Turn(None, None)
            shape = (self.layers, self.steps, self.channels // self.group_size, self.group_size)
            pairs = np.argsort(rng.random(shape), axis=-1).reshape(self.layers, self.steps, self.channels)
            return Turn(
                theta=jnp.asarray(rng.normal(size=(self.layers, self.steps, self.channels // 2)) * 3, jnp.float16),
                pairs=jnp.asarray(pairs, jnp.int16),
                channel_scales=jnp.asarray(rng.uniform(0.2, 3, (self.layers, self.channels)), jnp.float16),
            )

        x: Rows = jnp.asarray(rng.normal(size=(self.rows, self.channels)), self.dtype)
        if self.source == "gated":
            x = Gated(self._summand(rng), self._summand(rng))
        elif self.source:
            y = self._summand(rng) if self.source == "normed sum" else None
            x = Normed(x * 3, jnp.asarray(rng.normal(size=self.channels), self.dtype), 1e-6, y)
        return x, [one() for _ in range(self.rotations)]

    def _summand(self, rng: np.random.Generator) -> Any:
        """Parts as a product leaves them: among columns of others, with rows of which nothing is known."""
        shape = (self.rows, self.channels)
        if not self.parts:
            return jnp.asarray(rng.normal(size=shape), self.dtype)
        parts = np.full((self.parts, -(-self.rows // 8) * 8, self.channels + 128), np.nan, np.float32)
        parts[:, : self.rows, 128:] = rng.normal(size=(self.parts, *shape))
        return Partial(jnp.asarray(parts), 128, self.channels, shape, jnp.dtype(self.dtype))

    def call(self, implementation: str | int | None) -> Callable[..., tuple[Any, ...]]:
        """`call(x, turns, layer)`; of norms the sum comes first. A number is that of the rows of the kernel's CTAs."""

        def run(x, turns, layer):
            own = [turn._replace(layer=layer) for turn in turns]
            if isinstance(implementation, int):
                return mosaic_sm90.run(x, own, group_size=self.group_size, tile=implementation)
            if isinstance(x, Normed):
                total, turned = normed_rotations(x, own, group_size=self.group_size, implementation=implementation)
                return total, *turned
            if isinstance(x, Gated):
                return gated_rotations(x, own, group_size=self.group_size, implementation=implementation)
            return pairwise_rotations(x, own, group_size=self.group_size, implementation=implementation)

        return run


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def whole(x: Any) -> np.ndarray:
    """An array, in float64; of parts their sum, rounded to its dtype."""
    if isinstance(x, Partial):
        x = jnp.asarray(np.asarray(x.own, np.float64).sum(0)).astype(x.dtype)
    return wide(x)


def expected_sum(rows: Normed) -> np.ndarray:
    """In NumPy and float64, rounded."""
    return wide(rows.x) if rows.y is None else wide(jnp.asarray(wide(rows.x) + whole(rows.y)).astype(rows.dtype))


def expected(rows: Rows, turn: Turn, layer: int, shape: Shape) -> np.ndarray:
    """By the definition, in NumPy and float64, all pairs of a step at once; rows that are made have their dtype."""
    if isinstance(rows, Normed):
        x = expected_sum(rows)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + rows.epsilon) * wide(rows.weight)
        x = wide(jnp.asarray(x).astype(shape.dtype))
    elif isinstance(rows, Gated):
        gate = whole(rows.x)
        x = wide(jnp.asarray(gate / (1 + np.exp(-gate)) * whole(rows.y)).astype(shape.dtype))
    else:
        x = wide(rows)
    if turn.pairs is not None:
        theta, pairs, scales = (np.asarray(part[layer]) for part in turn[:3])
        x = x * scales.astype(np.float64)
        first = np.arange(x.shape[-1] // 2) * 2 // shape.group_size * shape.group_size
        for r in range(len(pairs)):
            i, j = first + pairs[r, 0::2], first + pairs[r, 1::2]
            cos, sin = np.cos(theta[r].astype(np.float64)), np.sin(theta[r].astype(np.float64))
            a, b = x[:, i].copy(), x[:, j].copy()
            x[:, i], x[:, j] = cos * a + sin * b, cos * b - sin * a
    return x


def check_shape(shape: Shape) -> dict[str, Any]:
    """Compares the last layer of each rotation with NumPy; three runs must give the same bits."""
    x, turns = shape.arguments()
    call, layer = jax.jit(shape.call("mosaic")), shape.layers - 1
    results = call(x, turns, jnp.int32(layer))
    again = [call(x, turns, jnp.int32(layer)) for _ in range(3)]
    every = [expected(x, turn, layer, shape) for turn in turns]
    if isinstance(x, Normed):
        every = [expected_sum(x), *every]
    errors = [
        np.linalg.norm(wide(result) - right) / np.linalg.norm(right)
        for result, right in zip(results, every, strict=True)
    ]
    row: dict[str, Any] = {"shape": shape.name, "error": float(np.max(errors)), "limit": LIMITS[shape.dtype]}
    same = [bool((a == b).all()) for repeat in again for a, b in zip(repeat, results, strict=True)]
    row["bitwise_repeatable"] = all(same)
    row["passes"] = row["bitwise_repeatable"] and row["error"] < row["limit"]  # a NaN is not below the limit
    return row


def check_shapes() -> Iterator[Shape]:
    for dtype in ("bfloat16", "float32"):
        for rows in (1, 2, 3, 8, 16, 17, 100, 1024):
            yield Shape(rows=rows, dtype=dtype)
        for group_size in (32, 64, 256):
            for rows in (1, 7, 16, 50):
                yield Shape(rows=rows, group_size=group_size, rotations=2, dtype=dtype)
    for rows in (1, 16, 300):
        yield Shape(rows=rows, channels=12288)
        yield Shape(rows=rows, rotations=3, channels=2048)
        for group_size in (32, 64, 128, 256):
            for source in SOURCES:
                yield Shape(rows=rows, rotations=2, group_size=group_size, source=source)
                yield Shape(rows=rows, steps=0, group_size=group_size, source=source)
    for rows, channels, dtype in itertools.product((1, 5, 16, 64), (1024, 2560, 5120, 12288), LIMITS):
        for steps, source in itertools.product((0, 8), SOURCES):
            yield Shape(rows=rows, channels=channels, source=source, dtype=dtype, steps=steps)
    for rows, parts, dtype in itertools.product((1, 9), (0, 1, 3, 11), LIMITS):
        yield Shape(rows=rows, source="normed sum", dtype=dtype, steps=0, parts=parts)
    for rows, channels, parts, dtype in itertools.product((1, 3, 8, 20, 64), (512, 12288), (0, 1, 2, 5), LIMITS):
        yield Shape(rows=rows, channels=channels, source="gated", dtype=dtype, parts=parts)
    for group_size, rotations in itertools.product((32, 64, 256), (1, 3)):
        yield Shape(rows=20, channels=6144, group_size=group_size, rotations=rotations, source="gated", parts=2)
    for channels in (96, 384, 896):  # clusters of 1 and of few CTAs
        yield Shape(rows=3, channels=channels, group_size=32, rotations=2, source="normed sum")


def time_shapes() -> Iterator[Shape]:
    for rows in (1, 8, 16, 64, 256, 1024, 4096):
        yield Shape(rows=rows, rotations=3, layers=16)
        yield Shape(rows=rows, channels=12288, layers=16)
    for rows, steps, source in itertools.product((1, 8, 16, 64), (0, 8), SOURCES):
        yield Shape(rows=rows, rotations=3 if steps else 1, steps=steps, layers=16, source=source)
    for rows in (1, 8, 16, 64):
        yield Shape(rows=rows, channels=12288, layers=16, source="gated", parts=2)


def over_layers(shape: Shape, implementation: str | int) -> Callable[..., Any]:
    call = shape.call(implementation)

    @jax.jit
    def run(x, turns):
        rows = x
        for layer in range(shape.layers):
            results = jax.lax.optimization_barrier(call(rows, turns, jnp.int32(layer)))
            # One operation, whose result a model needs for more than this, so that it is not done again for each use.
            after = lambda x, results=results: (x + 1e-30 * sum(r[:, :1] for r in results)).astype(x.dtype)  # noqa: E731
            if isinstance(x, Normed):
                rows = dataclasses.replace(x, x=jax.lax.optimization_barrier(after(x.x)))
            elif isinstance(x, Gated):
                parts = x.x.parts + 1e-30 * results[0][0, 0].astype(jnp.float32)
                rows = Gated(dataclasses.replace(x.x, parts=jax.lax.optimization_barrier(parts)), x.y)
            else:
                rows = jax.lax.optimization_barrier(after(x))
        return results

    return run


def measure(shape: Shape, *, sweep: bool = False) -> dict[str, Any]:
    row = check_shape(shape)
    x, turns = shape.arguments()
    named: dict[str, str | int] = {name: name for name in (("mosaic", "xla") if row["passes"] else ())}
    if sweep:
        most = 8 if shape.source and shape.parts else shape.rows
        named = {f"tiles of {tile}": tile for tile in TILES if tile <= min(shape.rows, most)}
    calls = {name: functools.partial(over_layers(shape, how), x, turns) for name, how in named.items()}
    return row | {"results": report.time_layers(calls, shape.layers)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--filter", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--sweep", action="store_true", help="time CTAs of 1 to 16 rows, and no peers")
    arguments = parser.parse_args(argv)
    if (reason := compat.missing_hopper()) is not None:
        print(reason, file=sys.stderr)
        return 2
    is_check = arguments.what == "check"
    shapes = check_shapes() if is_check else time_shapes()
    shapes = (shape for shape in shapes if any(part in shape.name for part in arguments.filter))
    if is_check:
        return report.record_shapes("rotation-check", shapes, check_shape)
    name = "rotation-sweep" if arguments.sweep else "rotation"
    return report.record_shapes(name, shapes, functools.partial(measure, sweep=arguments.sweep))


if __name__ == "__main__":
    sys.exit(main())

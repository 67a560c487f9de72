"""Norm and rotary embedding of queries and keys on a Hopper GPU: first that they are right, then how long they take.

    python -m benchmarks.norm_rope check      # every kind of call against NumPy in float64
    python -m benchmarks.norm_rope time       # against XLA's path, in the same process

Needs JAX with CUDA and NumPy. NumPy rounds where the definition does, so that what is left are float32's errors and
numbers that they carry over an edge of bfloat16: a kernel that forgets to round between the steps fails. One compiled
call runs layer after layer; the heads of a layer are made from the result of the one before by an elementwise
operation, and each layer has weights of its own. `device us` is the profiler's sum over all kernels of one layer, that
operation included.

What to expect: with few rows starting a kernel, one latency of memory and five exchanges between lanes, 1.5 to 2 us;
1024 rows of 40 heads of 128 channels read and write 42 MB, 5 us from the L2 cache or as fast as the memory gives them,
10 us.
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
from pallas_kernels.norm_rope import norm_rope
from pallas_kernels.partial import Partial

LIMITS = {"float32": 1e-6, "bfloat16": 3e-4}  # relative error in the L2 norm; without the rounding between 2e-3
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: M rows of a few arrays of heads."""

    rows: int = 1
    heads: tuple[int, ...] = (32, 8)
    head_dim: int = 128
    dtype: str = "bfloat16"
    weights: str = "bfloat16"
    layers: int = 1
    parts: int = 0  # of heads that are still to be added up, the last of which have no norm

    @property
    def name(self) -> str:
        heads = "+".join(map(str, self.heads))
        parts = f" in {self.parts} parts" if self.parts else ""
        return f"M={self.rows} N={heads} H={self.head_dim} {self.dtype} weights {self.weights}{parts}"

    def arguments(self) -> tuple[Any, Any, Any, Any]:
        """Heads `[1, M, N, H]`, for each layer their weights `[H]`, cosines and sines `[1, M, H / 2]`."""
        rng = np.random.default_rng(0)
        heads = tuple(
            jnp.asarray(rng.normal(size=(1, self.rows, n, self.head_dim)) * 2.0 ** rng.integers(-6, 6), self.dtype)
            for n in self.heads
        )
        if self.parts:
            heads = self._in_parts(rng)

        def weight(nth: int) -> Any:
            if self.parts and nth == len(heads) - 1 > 0:
                return None
            return jnp.asarray(rng.uniform(-2, 3, self.head_dim), self.weights)

        weights = [tuple(map(weight, range(len(heads)))) for _ in range(self.layers)]
        angles = rng.uniform(0, 2 * np.pi, (1, self.rows, self.head_dim // 2))
        return heads, weights, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)

    def _in_parts(self, rng: np.random.Generator) -> tuple[Partial, ...]:
        """As a product leaves them: side by side, with rows and columns of which nothing is known."""
        parts = np.full((self.parts, -(-self.rows // 8) * 8, sum(self.heads) * self.head_dim + 64), np.nan, np.float32)
        parts[:, : self.rows, 64:] = rng.normal(size=(self.parts, self.rows, parts.shape[2] - 64))
        array, first, heads = jnp.asarray(parts), 64, []
        for n in self.heads:
            shape, width = (1, self.rows, n, self.head_dim), n * self.head_dim
            heads.append(Partial(array, first, width, shape, jnp.dtype(self.dtype)))
            first += width
        return tuple(heads)

    def call(self, implementation: str | None) -> Callable[..., tuple[Any, ...]]:
        """`call(heads, weights, cos, sin)` of one layer."""
        return lambda *operands: norm_rope(*operands, epsilon=EPSILON, implementation=implementation)


def expected(x: Any, weight: Any, cos: Any, sin: Any, epsilon: float = EPSILON) -> np.ndarray:
    """Of heads `[..., T, N, H]`, in NumPy and float64, rounded to their dtype after each of the two steps."""

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(x.dtype).astype(np.float64)

    if isinstance(x, Partial):
        wide = rounded(np.asarray(x.own, np.float64).sum(0)).reshape(x.shape)
    else:
        wide = np.asarray(x).astype(np.float64)
    if weight is None:
        return wide
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    a, b = np.split(rounded(normed * np.asarray(weight).astype(np.float64)), 2, axis=-1)
    cos, sin = (np.asarray(table, np.float64)[..., None, :] for table in (cos, sin))
    return rounded(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))


def error_of(result: Any, right: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(result).astype(np.float64) - right) / np.linalg.norm(right))


def check_shape(shape: Shape) -> dict[str, Any]:
    """Compares with NumPy; three more runs must give the same bits."""
    heads, weights, cos, sin = shape.arguments()
    call = jax.jit(shape.call("mosaic"))
    results, *again = (call(heads, weights[0], cos, sin) for _ in range(4))
    errors = [
        error_of(result, expected(x, weight, cos, sin))
        for result, x, weight in zip(results, heads, weights[0], strict=True)
    ]
    row: dict[str, Any] = {"shape": shape.name, "error": float(np.max(errors)), "limit": LIMITS[shape.dtype]}
    same = [bool((a == b).all()) for repeat in again for a, b in zip(repeat, results, strict=True)]
    row["bitwise_repeatable"] = all(same)
    row["passes"] = row["bitwise_repeatable"] and row["error"] < row["limit"]  # a NaN is not below the limit
    return row


def check_shapes() -> Iterator[Shape]:
    for dtype in LIMITS:
        for weights in LIMITS:
            for rows in (1, 2, 3, 16, 100, 1024):
                yield Shape(rows=rows, dtype=dtype, weights=weights)
            for head_dim in (64, 192, 256):
                for rows, heads in ((1, (32, 8)), (3, (5,)), (7, (1, 2, 3)), (50, (16, 16))):
                    yield Shape(rows=rows, heads=heads, head_dim=head_dim, dtype=dtype, weights=weights)
            for rows, head_dim, parts in itertools.product((1, 3, 16, 64), (64, 128, 192, 256), (1, 2, 6)):
                options = {"rows": rows, "head_dim": head_dim, "parts": parts, "dtype": dtype, "weights": weights}
                yield Shape(heads=(32, 8, 8), **options)
    for rows, heads in ((1, (1,)), (3, (1, 1)), (5, (28, 4)), (4096, (32, 8))):
        yield Shape(rows=rows, heads=heads)
    yield Shape(rows=5, heads=(7,), parts=9)


def time_shapes() -> Iterator[Shape]:
    for rows in (1, 8, 16, 64, 256, 1024):
        yield Shape(rows=rows, layers=16)
    for rows in (1, 8, 16, 64):
        yield Shape(rows=rows, layers=16, heads=(32, 8, 8), parts=6)


def over_layers(shape: Shape, implementation: str) -> Callable[..., Any]:
    call = shape.call(implementation)

    @jax.jit
    def run(heads, weights, cos, sin):
        own = heads
        for of_layer in weights:
            results = jax.lax.optimization_barrier(call(own, of_layer, cos, sin))
            if shape.parts:  # of one array
                after = heads[0].parts + 1e-30 * sum(result.ravel()[0].astype(jnp.float32) for result in results)
                after = jax.lax.optimization_barrier(after)
                own = tuple(dataclasses.replace(x, parts=after) for x in heads)
                continue
            own = tuple((x + 1e-30 * result).astype(x.dtype) for x, result in zip(heads, results, strict=True))
            own = jax.lax.optimization_barrier(own)
        return results

    return run


def measure(shape: Shape) -> dict[str, Any]:
    row = check_shape(shape)
    arguments = shape.arguments()
    names = ("mosaic", "xla") if row["passes"] else ()
    calls = {name: functools.partial(over_layers(shape, name), *arguments) for name in names}
    return row | {"results": report.time_layers(calls, shape.layers)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    arguments = parser.parse_args(argv)
    if (reason := compat.missing_hopper()) is not None:
        print(reason, file=sys.stderr)
        return 2
    is_check = arguments.what == "check"
    shapes = check_shapes() if is_check else time_shapes()
    return report.record_shapes(
        "norm_rope-check" if is_check else "norm_rope", shapes, check_shape if is_check else measure
    )


if __name__ == "__main__":
    sys.exit(main())

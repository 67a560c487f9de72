"""Attention on a Hopper GPU: first that the kernels are right at real sizes, then how fast they are.

    python -m benchmarks.attention_gpu check                 # every configuration against the float32 definition
    python -m benchmarks.attention_gpu time                  # the forward tables, peers in the same process
    python -m benchmarks.attention_gpu time --gradients      # forward, and forward with backward
    python -m benchmarks.attention_gpu time --skip           # skipped tiles; with --gradients also the backward
    python -m benchmarks.attention_gpu time --dispatch       # what the automatic choice is derived from
    python -m benchmarks.attention_gpu time --sweep --filter "H=128 causal"   # other tile sizes too
    python -m benchmarks.attention_gpu memory                # device memory at 128K tokens

Needs JAX with CUDA and NumPy; PyTorch and tokamax are peers where they are installed. `--seconds` ends a run early,
keeping what it has; the shapes that matter most come first.

Timing: all contestants of a shape take turns, `repeats` rounds; one sample is a batch of calls queued back to back,
long enough that dispatch is hidden, divided by their number. `device ms` beside it is the profiler's sum of device
time per call: the median of `profiles` profiles of 5 calls each, taken in turns too (of PyTorch one, at the end).
Later shapes are compiled meanwhile, which can disturb the first but not the second. Rates count the floating-point
operations of the pairs that the mask allows, 4 H each forward and 2.5 times that backward, so a contestant that visits
masked tiles shows a lower rate. Percentages refer to a bf16 matrix product measured in the same run. Nothing is
done to make the L2 cache cold: in a model, the projection before has just written the operands. Clocks and power stand
beside each row, as they were right after its last sample.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and other processes share the memory
if "check" in sys.argv:  # the definition need not be fast, and tuning its matmuls takes longer than all kernels
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import report
from pallas_kernels import masks
from pallas_kernels.attention import cudnn, mosaic_sm90, reference, xla
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip, SkipTile

Config = mosaic_sm90.Config
BackwardConfig = mosaic_sm90.BackwardConfig

SKIP_TILE = SkipTile()
NOTHING = -1000.0  # a threshold that skips nothing
LOG_THRESHOLD = -1.0  # far from the margins of small tiles (about -8) and of the others (about 0)

# Tile sizes of the sweep, by head dim; the heuristic's choice is always timed.
SWEEP = {
    64: [Config(block_q=64, block_k=128, stages=s) for s in (2, 3, 4)]
    + [Config(block_q=128, block_k=128, stages=3), Config(block_q=64, block_k=256, stages=3)],
    96: [Config(block_q=64, block_k=128, stages=s) for s in (2, 3)],
    128: [Config(block_q=64, block_k=128, stages=2)] + [Config(block_q=64, block_k=64, stages=s) for s in (2, 3, 4, 5)],
    256: [Config(block_q=64, block_k=64, stages=2)],
}
BACKWARD_SWEEP = {
    64: [
        BackwardConfig(block_q=64, block_k=64, q_stages=4, k_stages=4),
        BackwardConfig(block_q=64, block_k=128, q_stages=4, k_stages=3),
    ],
    128: [
        BackwardConfig(block_q=64, block_k=64, q_stages=2, k_stages=2),
        BackwardConfig(block_q=64, block_k=128, q_stages=4, k_stages=2),
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of a table; `limits` names the run-time limits that the call carries."""

    mask: masks.Mask
    batch: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_keys: int | None = None  # None: as many as queries
    dtype: str = "bfloat16"
    limits: str = ""
    value_dim: int | None = None  # None: head_dim
    small: float | None = None  # with skipped tiles: the share of key tiles whose scores are small, hence skipped
    by: str = "mosaic"  # of `check`: the implementation that is compared with the definition
    mapped: bool = False  # of `check`: one `jax.vmap` over the batch instead of a batch

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def keys(self) -> int:
        return self.num_queries if self.num_keys is None else self.num_keys

    @property
    def name(self) -> str:
        return (
            f"{self.mask} {self.limits} B={self.batch} T={self.num_queries} S={self.keys} N={self.num_heads} "
            f"K={self.num_kv_heads} H={self.head_dim} {self.dtype}"
            + f" Hv={self.value_dim}" * bool(self.value_dim)
            + f" skipping, {self.small} small" * (self.small is not None)
            + f" by {self.by}" * (self.by != "mosaic")
            + " under vmap" * self.mapped
        ).replace("  ", " ")

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), 3)
        kv_shape = (self.batch, self.keys, self.num_kv_heads)
        q_shape = (self.batch, self.num_queries, self.num_heads, self.head_dim)
        shapes = (q_shape, *((*kv_shape, size) for size in self.head_dims))
        q, k, v = (jax.random.normal(a, s, self.dtype) for a, s in zip(keys, shapes, strict=True))
        if self.small is not None:
            small = np.random.default_rng(1).random(-(-self.keys // SKIP_TILE.width)) < self.small
            small[0] = False  # the first tile sets the maximum that the others are measured by
            size = np.repeat(np.where(small, 0.2, 3.0), SKIP_TILE.width)[: self.keys, None, None]
            k = (k * size).astype(self.dtype)
        return q, k, v

    @property
    def log_threshold(self) -> float:
        return LOG_THRESHOLD if self.small else NOTHING

    def make_skip(self) -> Skip | None:
        return None if self.small is None else Skip(jnp.full((self.batch,), self.log_threshold), SKIP_TILE)

    def make_limits(self) -> Limits:
        rng = np.random.default_rng(0)
        given: dict[str, Any] = {}
        if "lengths" in self.limits:
            given["kv_lengths"] = rng.integers(0, self.keys + 1, self.batch)
        if "segments" in self.limits:
            cuts = np.sort(rng.integers(0, self.keys, (self.batch, 5)), axis=1)
            segments = (np.arange(self.keys)[None, :, None] >= cuts[:, None]).sum(-1) + 1
            given["k_segments"] = np.where(segments == 6, -1, segments)  # the tail is padding
            given["q_segments"] = given["k_segments"][:, self.keys - self.num_queries :]
        if "positions" in self.limits:
            order = np.stack([np.roll(np.arange(self.keys), 37 * (b + 1)) for b in range(self.batch)])
            given["k_positions"] = np.where(rng.random(order.shape) < 0.1, -1, order)
            given["q_positions"] = np.tile(np.arange(self.num_queries) + self.keys - self.num_queries, (self.batch, 1))
        return Limits(**{name: jnp.asarray(value, jnp.int32) for name, value in given.items()})

    def pairs(self) -> int:
        """Visible (query, key) pairs per head and row, of the mask alone."""
        index = np.arange(self.num_queries) + self.mask.query_offset(self.num_queries, self.keys)
        return sum(
            int(np.maximum(np.clip(stop, 0, self.keys) - np.clip(start, 0, self.keys), 0).sum())
            for start, stop in self.mask.key_intervals(index, self.keys)
        )

    def flops(self) -> float:
        return 2.0 * self.batch * self.num_heads * sum(self.head_dims) * self.pairs()


def mosaic(
    shape: Shape, config: Config | None = None, backward_config: BackwardConfig | None = None
) -> Callable[..., Any]:
    """(q, k, v, limits) -> (output, log-sum-exp), with skipped tiles also which were kept."""

    def call(q, k, v, limits):
        options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "skip": shape.make_skip()}
        options |= {"config": config, "backward_config": backward_config}
        return mosaic_sm90.run(q, k, v, mask=shape.mask, limits=limits, **options)

    return call


def checked_call(shape: Shape) -> Callable[..., Any]:
    """`mosaic(shape)`, or cuDNN without log-sum-exp, or either as one call per row under `jax.vmap`."""
    call = mosaic(shape)
    if shape.by == "cudnn":

        def call(q, k, v, limits):
            return (cudnn.run(q, k, v, mask=shape.mask, limits=limits, scale=shape.head_dim**-0.5)[0],)

    if not shape.mapped:
        return call
    one_row = call

    def row(q, k, v, limits):
        out, lse = one_row(*(x[None] for x in (q, k, v)), jax.tree.map(lambda x: x[None], limits))
        return out[0], lse[0]

    return jax.vmap(row)


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`(q, k, v, *more, cotangents) -> (results, (dq, dk, dv))` of `attend(q, k, v, *more)`.

    The cotangents are those of the result, or of the first two of several.
    """

    def call(q, k, v, *more):
        def differentiable(q, k, v):
            results = attend(q, k, v, *more[:-1])
            return (results[:2] if isinstance(results, tuple) else results), results

        _, pull, results = jax.vjp(differentiable, q, k, v, has_aux=True)
        return results, pull(more[-1])

    return call


def chosen(shapes: Iterator[Shape], arguments: argparse.Namespace) -> list[Shape]:
    return [shape for shape in shapes if any(part in shape.name for part in arguments.filter)]


# ---------------------------------------------------------------------------------------------------------------
# Correctness


def check_shapes() -> Iterator[Shape]:
    """Real sizes, every form of masking, and the lengths at which tiles end; what was never run on a GPU first."""
    shape = functools.partial(Shape, batch=2, num_heads=8, num_kv_heads=2, head_dim=128)
    doubled = masks.BlockDiffusion(2048, 64)
    for mask in (masks.Causal(), masks.Full(), doubled):
        yield shape(mask=mask, num_queries=4096)
    for limits in ("lengths", "segments", "positions", "lengths segments", "lengths positions"):
        for mask in (masks.Causal(), masks.SlidingWindow(300, 4), masks.Full()):
            yield shape(mask=mask, batch=3, num_queries=2000, limits=limits)
    yield shape(mask=masks.Causal(), num_queries=1000, mapped=True)
    yield shape(mask=masks.Full(), num_queries=1000, mapped=True, limits="lengths")
    for head_dim in (64, 128):
        for dtype in mosaic_sm90.DTYPES:
            for mask in (masks.Causal(), masks.Full()):
                for length in (256, 4096):
                    yield shape(mask=mask, num_queries=length, head_dim=head_dim, dtype=dtype, by="cudnn")
    yield shape(mask=masks.Full(), num_queries=500, num_keys=3000, by="cudnn")
    for small in (0.0, 0.5, 0.9):
        yield shape(mask=masks.Causal(), num_queries=4096, small=small)
    yield shape(mask=doubled, num_queries=4096, small=0.5)
    for limits in ("lengths", "segments", "positions"):
        yield shape(mask=masks.Full(), batch=3, num_queries=2000, limits=limits, small=0.5)
    yield shape(mask=masks.Causal(), num_queries=1000, head_dim=64, small=0.5)
    yield shape(mask=masks.Causal(), num_queries=500, num_keys=3000)
    yield shape(mask=masks.Causal(), num_queries=3000, num_keys=500)  # the first 2500 rows see nothing
    for heads, kv_heads in ((4, 4), (8, 1)):
        yield shape(mask=masks.Causal(), num_queries=1025, num_heads=heads, num_kv_heads=kv_heads)
    for head_dim, value_dim in mosaic_sm90.HEAD_DIMS:
        for dtype in mosaic_sm90.DTYPES:
            for mask in (masks.Causal(), masks.Full(), doubled):
                if (head_dim, dtype) != (128, "bfloat16"):
                    wide = None if value_dim == head_dim else value_dim
                    yield shape(mask=mask, num_queries=4096, head_dim=head_dim, value_dim=wide, dtype=dtype)
    for mask in (
        masks.SlidingWindow(1000, 4),
        masks.SlidingWindow(64),
        masks.BlockCausal(48),
        masks.PrefixBidirectional(777),
    ):
        yield shape(mask=mask, num_queries=3001)
    for block, clean in ((16, "block"), (48, "block"), (256, "token")):
        yield shape(mask=masks.BlockDiffusion(1500, block, clean), num_queries=3000)
        yield shape(mask=masks.BlockDiffusion(1500, block, clean), num_queries=1500, num_keys=3000)
    for length in (1, 7, 63, 64, 65, 127, 128, 129, 1000):
        yield shape(mask=masks.Causal(), num_queries=length)
        yield shape(mask=masks.Full(), num_queries=length, num_keys=1111, head_dim=64)


def seen(shape: Shape, limits: Limits) -> np.ndarray:
    """Bool `[#B, T, S]` by the definition, computed on the host."""
    with jax.default_device(jax.devices("cpu")[0]):
        given = Limits(*(None if limit is None else np.asarray(limit) for limit in limits))
        return np.asarray(reference.visible(shape.mask, given, shape.num_queries, shape.keys))


@functools.partial(jax.jit, static_argnames=("scale", "rows"))
def define(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    kept: Array | None,
    d_out: Array,
    d_lse: Array,
    *,
    scale: float,
    rows: int = 256,
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """The definition and its gradients in float32, some rows of queries at a time to bound the memory.

    `kept` are decisions about skip tiles, bool `[B, N, query tiles, key tiles]`, or None.
    """
    batch, length = q.shape[:2]
    steps = -(-length // rows)

    def cut(x: Array, axis: int = 1) -> Array:
        """Rows along `axis` in steps, on a new first axis."""
        x = jnp.pad(x, [(0, steps * rows - length) if i == axis else (0, 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], steps, rows, *x.shape[axis + 1 :]), axis, 0)

    def join(x: Array, axis: int = 1) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], steps * rows, *x.shape[axis + 2 :])[(slice(None),) * axis + (slice(length),)]

    def step(carry, here):
        q_here, visible_here, kept_here, *cotangents = here
        if kept_here is not None:
            kept_here = rule.per_pair(kept_here, SKIP_TILE, rows, k.shape[1])
        attend = functools.partial(reference.attend, seen=visible_here, scale=scale, kept=kept_here)
        (out, lse), pull = jax.vjp(attend, q_here, k, v)
        dq, dk, dv = pull(tuple(cotangents))
        return (carry[0] + dk, carry[1] + dv), (out, lse, dq)

    q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    if kept is not None:
        tiles = rows // SKIP_TILE.rows
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, steps * tiles - kept.shape[2]), (0, 0)))
        kept = jnp.moveaxis(kept.reshape(*kept.shape[:2], steps, tiles, -1), 2, 0)
    cuts = (cut(q), cut(jnp.broadcast_to(visible, (batch, *visible.shape[1:]))), kept, cut(d_out), cut(d_lse, 2))
    (dk, dv), (out, lse, dq) = jax.lax.scan(step, (jnp.zeros_like(k), jnp.zeros_like(v)), cuts)
    return (join(out), join(lse, 2)), (join(dq), dk, dv)


def check_shape(shape: Shape) -> dict[str, Any]:
    """Compares output and gradients with the float32 definition; each of 10 runs must give the same bits."""
    row: dict[str, Any] = {"shape": shape.name}
    start = time.perf_counter()
    try:
        q, k, v = shape.arrays()
        limits = shape.make_limits()
        visible = seen(shape, limits)
        # What takes part in no pair must not matter, whatever it holds.
        blind, empty = ~visible.any(2)[:, :, None, None], ~visible.any(1)[:, :, None, None]
        d_out = jax.random.normal(jax.random.key(1), (*q.shape[:3], v.shape[3]), q.dtype)
        d_lse = jax.random.normal(jax.random.key(2), (q.shape[0], q.shape[2], q.shape[1]))
        q, d_out = (jnp.where(blind, jnp.nan, x) for x in (q, d_out))
        k, v = (jnp.where(empty, jnp.nan, x) for x in (k, v))
        scale, kept = shape.head_dim**-0.5, None
        if shape.by == "cudnn":  # its log-sum-exp is not offered
            d_lse = jnp.zeros_like(d_lse)
        cotangents = (d_out, d_lse) if shape.by == "mosaic" else (d_out,)
        if shape.head_dims in mosaic_sm90.BACKWARD_HEAD_DIMS:
            call = functools.partial(jax.jit(with_gradients(checked_call(shape))), q, k, v, limits, cotangents)
            results, gradients = call()
        else:
            call = functools.partial(jax.jit(checked_call(shape)), q, k, v, limits)
            results, gradients = call(), ()
        jax.block_until_ready((results, gradients))
        row["seconds_to_first_result"] = time.perf_counter() - start
        row["bitwise_repeatable"] = all(
            bool((again == before).all())
            for _ in range(10)
            for before, again in zip(jax.tree.leaves((results, gradients)), jax.tree.leaves(call()), strict=True)
        )
        if shape.small is not None:
            kept = results[2]
            row |= check_decisions(shape, jnp.where(blind, 0, q), k, limits, kept)
        clean = (jnp.where(blind, 0, q), k, v, visible, kept, jnp.where(blind, 0, d_out), d_lse)
        expected = dict(
            zip(("out", "lse", "dq", "dk", "dv"), jax.tree.leaves(define(*clean, scale=scale)), strict=True)
        )
    except Exception as error:  # one shape that cannot run must not hide the others
        return row | {"passes": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    # Only our kernels promise the same bits in every run.
    row["passes"] = (row["bitwise_repeatable"] or shape.by != "mosaic") and not row.get("wrong_decisions")
    if shape.by == "cudnn":
        del expected["lse"]
    # Sums of products rounded to 8 (bfloat16) or 11 bits: relative to the norm, a few rounding errors of one product.
    relative = 1e-2 if shape.dtype == "bfloat16" else 2e-3
    for (name, want), got in zip(expected.items(), (*results[:2], *gradients), strict=False):
        both_empty = (got == -jnp.inf) & (want == -jnp.inf)
        error = jnp.where(both_empty, 0.0, got.astype(jnp.float32) - want)
        row[f"{name}_max_error"] = float(jnp.abs(error).max())
        if name == "lse":
            row["passes"] &= row["lse_max_error"] <= 1e-4
        else:
            row[f"{name}_error"] = float(jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(want), 1e-30))
            row["passes"] &= row[f"{name}_error"] <= relative  # NaN fails too
    row["seconds"] = time.perf_counter() - start
    return row


def check_decisions(shape: Shape, q: Array, k: Array, limits: Limits, kept: Array) -> dict[str, Any]:
    """Compares decisions with those of the XLA path where rounding cannot decide otherwise."""
    options = {"mask": shape.mask, "scale": shape.head_dim**-0.5, "tile": SKIP_TILE}
    margins = jax.jit(functools.partial(xla.skip_margins, **options))(q, k, limits=limits)
    wrong = (kept != rule.keeps(margins, shape.log_threshold)) & (jnp.abs(margins - shape.log_threshold) > 1e-2)
    visited = margins != -jnp.inf
    return {"wrong_decisions": int(wrong.sum()), "skipped": 1.0 - float(kept.sum() / visited.sum())}


def check(arguments: argparse.Namespace) -> int:
    """Checks all shapes, many processes at a time, since most of the time is compilation."""
    deadline = time.monotonic() + arguments.seconds
    record = report.Record("attention_gpu-check")
    shapes = chosen(check_shapes(), arguments)
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        running = pool.imap_unordered(check_shape, shapes)
        for _ in shapes:
            try:
                row = running.next(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
            except multiprocessing.TimeoutError:
                break
            record.add(row)
            values = ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
                if name not in ("passes", "bitwise_repeatable")
            )
            print(f"{'ok  ' if row['passes'] else 'FAIL'} {values}", flush=True)
        pool.terminate()
    failed = sum(not row["passes"] for row in record.rows)
    missing = len(shapes) - len(record.rows)
    print(f"{len(record.rows)} shapes, {failed} failed, {missing} not reached in {arguments.seconds:.0f} s")
    return 1 if failed or missing or not record.rows else 0


# ---------------------------------------------------------------------------------------------------------------
# Speed


def time_shapes() -> Iterator[Shape]:
    """16k tokens of 2048 features, as in published tables; then grouped heads, the doubled mask and a window."""
    for head_dim in (128, 64):
        for mask in (masks.Causal(), masks.Full()):
            for length in (1024, 4096, 16384):
                heads = 2048 // head_dim
                yield Shape(
                    mask=mask,
                    batch=16384 // length,
                    num_queries=length,
                    num_heads=heads,
                    num_kv_heads=heads,
                    head_dim=head_dim,
                )
    grouped = functools.partial(Shape, num_heads=32, num_kv_heads=8, head_dim=128)
    yield grouped(mask=masks.Causal(), batch=4, num_queries=4096)
    yield grouped(mask=masks.Causal(), batch=2, num_queries=8192)
    yield grouped(mask=masks.BlockDiffusion(4096, 64), batch=2, num_queries=8192)
    yield grouped(mask=masks.BlockDiffusion(4096, 16), batch=2, num_queries=8192)
    yield grouped(mask=masks.SlidingWindow(1024, 4), batch=2, num_queries=8192)
    yield grouped(mask=masks.Causal(), batch=2, num_queries=8192, limits="segments")
    yield grouped(mask=masks.Causal(), batch=2, num_queries=8192, head_dim=192, value_dim=128)


def skip_shapes() -> Iterator[Shape]:
    """A long prompt at several shares of skipped tiles."""
    for length, batch, shares in (
        (65536, 1, (None, 0.0, 0.5, 0.75, 0.9)),
        (8192, 2, (None, 0.0, 0.5, 0.75, 0.9)),
        (32768, 1, (None, 0.0, 0.5, 0.75, 0.9)),
    ):
        for small in shares:
            yield Shape(
                mask=masks.Causal(),
                batch=batch,
                num_queries=length,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                small=small,
            )


def gradient_shapes() -> Iterator[Shape]:
    """The shapes of training, the most important first."""
    grouped = functools.partial(Shape, batch=2, num_queries=8192, num_heads=32, num_kv_heads=8, head_dim=128)
    equal = functools.partial(Shape, num_heads=16, num_kv_heads=16, head_dim=128)
    yield grouped(mask=masks.Causal())
    yield grouped(mask=masks.BlockDiffusion(4096, 64))
    yield equal(mask=masks.Causal(), batch=4, num_queries=4096)
    yield equal(mask=masks.Full(), batch=4, num_queries=4096)
    yield equal(mask=masks.Causal(), batch=4, num_queries=4096, num_heads=32, num_kv_heads=32, head_dim=64)
    yield equal(mask=masks.Causal(), batch=2, num_queries=8192)
    yield equal(mask=masks.Full(), batch=2, num_queries=8192)
    yield grouped(mask=masks.BlockDiffusion(4096, 16))
    yield grouped(mask=masks.SlidingWindow(1024, 4))
    yield grouped(mask=masks.Causal(), limits="segments")


def dispatch_shapes() -> Iterator[Shape]:
    """What the automatic choice must know: each kind of mask, head dim and skipping, against the portable path."""
    grouped = functools.partial(Shape, batch=2, num_heads=32, num_kv_heads=8, head_dim=128)
    equal = functools.partial(Shape, batch=4, num_heads=32, num_kv_heads=32, head_dim=64)
    yield grouped(mask=masks.Causal(), num_queries=4096)
    yield grouped(mask=masks.Causal(), num_queries=1024)
    yield grouped(mask=masks.Causal(), num_queries=8192)
    yield grouped(mask=masks.BlockDiffusion(2048, 64), num_queries=4096)
    yield grouped(mask=masks.Full(), num_queries=4096)
    yield grouped(mask=masks.SlidingWindow(1024, 4), num_queries=4096)
    yield grouped(mask=masks.Causal(), num_queries=4096, small=0.8)
    yield equal(mask=masks.Causal(), num_queries=4096)
    yield grouped(mask=masks.Causal(), num_queries=256)
    yield grouped(mask=masks.BlockDiffusion(512, 64), num_queries=1024)
    yield grouped(mask=masks.Full(), num_queries=1024)
    yield equal(mask=masks.Causal(), num_queries=1024)
    yield equal(mask=masks.BlockDiffusion(512, 16), num_queries=1024)  # the shipped models train on these
    yield grouped(mask=masks.Causal(), num_queries=4096, head_dim=192, value_dim=128)
    yield grouped(mask=masks.Causal(), num_queries=4096, head_dim=256)
    yield grouped(mask=masks.SlidingWindow(256, 4), num_queries=1024)
    yield equal(mask=masks.Full(), num_queries=4096)
    yield equal(mask=masks.BlockDiffusion(2048, 64), num_queries=4096)
    yield grouped(mask=masks.Causal(), num_queries=4096, head_dim=96)
    yield grouped(mask=masks.BlockCausal(32), num_queries=4096)


WITH_GRADIENTS = " + gradients"  # ending of a contestant's name


def contestants(shape: Shape, arguments: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What runs this shape, by name: functions that compile and return the call without arguments.

    For a mask that cuDNN does not know it computes a causal one instead.
    """
    q, k, v = shape.arrays()
    limits = shape.make_limits()
    d_out = jax.random.normal(jax.random.key(1), (*q.shape[:3], v.shape[3]), q.dtype)
    d_lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    gradients = arguments.gradients and shape.head_dims in mosaic_sm90.BACKWARD_HEAD_DIMS
    prepared: dict[str, Callable[[], Callable[[], Any]]] = {}

    def compiled(function, *args):
        return functools.partial(jax.jit(function).lower(*args).compile(), *args)

    def add(name, attend, more, cotangents):
        prepared[name] = functools.partial(compiled, attend, q, k, v, *more)
        if gradients:
            prepared[name + WITH_GRADIENTS] = functools.partial(
                compiled, with_gradients(attend), q, k, v, *more, cotangents
            )

    add("mosaic", mosaic(shape), (limits,), (d_out, d_lse))
    if shape.small is not None:  # the same numbers: what these are decides how much power and so which clock it takes
        add("mosaic, dense", mosaic(dataclasses.replace(shape, small=None)), (limits,), (d_out, d_lse))
    if arguments.sweep and gradients:
        for tiles in BACKWARD_SWEEP.get(shape.head_dim, ()):
            name = "mosaic " + " ".join(str(value) for value in vars(tiles).values()) + WITH_GRADIENTS
            swept = with_gradients(mosaic(shape, backward_config=tiles))
            prepared[name] = functools.partial(compiled, swept, q, k, v, limits, (d_out, d_lse))
    elif arguments.sweep:
        for config in SWEEP[shape.head_dim]:
            if config != mosaic_sm90.heuristic_config(shape.head_dim):
                name = f"mosaic {config.block_q}x{config.block_k} stages={config.stages}"
                prepared[name] = functools.partial(compiled, mosaic(shape, config), q, k, v, limits)
    if arguments.xla:
        options = {"mask": shape.mask, "scale": shape.head_dim**-0.5}

        def portable(q, k, v, limits):
            return xla.run(q, k, v, limits=limits, skip=shape.make_skip(), **options)

        add("xla", portable, (limits,), (d_out, d_lse))
    causal = not isinstance(shape.mask, masks.Full)
    same = isinstance(shape.mask, masks.Causal | masks.Full) and not shape.limits
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    add("cudnn" if same else "cudnn, causal", cudnn, (), d_out)
    if same and not (arguments.dispatch and shape.num_queries < 4096) and importlib.util.find_spec("tokamax"):
        import tokamax
        from absl import flags

        if not flags.FLAGS.is_parsed():  # tokamax reads its options from absl's flags, which must not read ours
            flags.FLAGS.mark_as_parsed()
        peer = functools.partial(tokamax.dot_product_attention, is_causal=causal, implementation="mosaic_gpu")
        add("tokamax", peer, (), d_out)
    if same and not arguments.dispatch and importlib.util.find_spec("torch"):
        prepared["torch"] = functools.partial(torch_call, shape, causal=causal, gradients=False)
        if gradients:
            prepared["torch" + WITH_GRADIENTS] = functools.partial(torch_call, shape, causal=causal, gradients=True)
    return prepared


def torch_call(shape: Shape, *, causal: bool, gradients: bool) -> Callable[[], Any]:
    """PyTorch's scaled_dot_product_attention on arrays of its own, heads before length as it wants them."""
    import torch

    dtype = getattr(torch, shape.dtype)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    lengths = (shape.num_queries, shape.keys, shape.keys)
    q, k, v = (
        torch.randn(shape.batch, length, n, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_(gradients)
        for n, length, size in zip(heads, lengths, (shape.head_dim, *shape.head_dims), strict=True)
    )
    d_out = torch.randn(shape.batch, shape.num_queries, shape.num_heads, v.shape[3], device="cuda", dtype=dtype)
    d_out = d_out.transpose(1, 2)

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=shape.num_heads != shape.num_kv_heads
        )
        return torch.autograd.grad(out, (q, k, v), d_out)[0] if gradients else out

    return call


def torch_device_ms(call: Callable[[], Any], *, calls: int = 5) -> float:
    """Device time per call by PyTorch's own profiler."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls / 1e3


def wait_for(result: Any) -> None:
    if type(result).__module__.startswith("torch"):
        import torch

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(result)


def sample(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call of `calls` calls queued back to back."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait_for(result)
    return (time.perf_counter() - start) / calls


def matmul_flops_per_second() -> float:
    """The ceiling: a square bf16 matrix product of random numbers."""
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    call = functools.partial(multiply, a, b)
    sample(call, 5)
    return 2 * n**3 / statistics.median(sample(call, 10) for _ in range(10))


def measure(
    shape: Shape, prepared: dict[str, concurrent.futures.Future], arguments: argparse.Namespace, ceiling: float
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """A row of the record, and PyTorch's calls, which remain to be profiled."""
    calls, failures = {}, {}
    for name, future in prepared.items():
        try:
            calls[name] = future.result()
            wait_for(calls[name]())
        except Exception as error:  # a peer that cannot run a shape is a row of the table, not the end of it
            calls.pop(name, None)
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: {failures[name]}")
    batch, rounds = {}, {}
    for name, call in calls.items():
        sample(call, 2)
        once = sample(call, 2)
        batch[name] = max(1, min(100, int(0.01 / once) + 1))  # about 10 ms a sample
        rounds[name] = arguments.repeats if once < 1.0 else min(3, arguments.repeats)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = [*calls]
    for turn in range(arguments.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= rounds[name]:
                continue
            seconds[name].append(sample(calls[name], batch[name]))
    # In turn as well: the clock falls and rises with what ran before. PyTorch's come later, see run_timing.
    profiles: dict[str, list[dict[str, Any]]] = {name: [] for name in calls if not name.startswith("torch")}
    names = [*profiles]
    for turn in range(arguments.profiles):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            profiles[name].append(report.device_profile(calls[name]))
    results: dict[str, Any] = {}
    for name in calls:
        row = report.spread(seconds[name])
        flops = shape.flops()
        if name.startswith("cudnn, causal"):
            flops = dataclasses.replace(shape, mask=masks.Causal(), limits="").flops()
        row["flops"] = flops * (3.5 if name.endswith(WITH_GRADIENTS) else 1.0)
        row["percent_of_matmul_by_wall"] = 1e5 * row["flops"] / row["median_ms"] / ceiling
        if name in profiles:
            taken = sorted(profiles[name], key=lambda profile: profile["device_ms"])
            row["operations"] = taken[len(taken) // 2]["operations"]
            row["device_samples_ms"] = [profile["device_ms"] for profile in profiles[name]]
            add_device_time(row, statistics.median(row["device_samples_ms"]), ceiling)
        results[name] = row
        device = f"device {row['device_ms']:8.4f} ms  {row['tflops']:6.1f} TFLOP/s" if "device_ms" in row else ""
        spread = f"[{row['min_ms']:.4f}, {row['max_ms']:.4f}]"
        print(f"  {name:32s} {row['median_ms']:8.4f} ms {spread}  {device}", flush=True)
        if name.startswith("mosaic") and len(row["operations"]) > 1:
            print("    " + ", ".join(f"{op['name'][:40]} {op['ms']:.4f}" for op in row["operations"]), flush=True)
    torch_calls = {name: call for name, call in calls.items() if name.startswith("torch")}
    record = {"shape": shape.name, "pairs": shape.pairs(), "gpu": report.clocks()}
    if shape.small is not None and "mosaic" in calls:
        kept = calls["mosaic"]()[2]
        visited = xla.visited_tiles(
            shape.mask, shape.make_limits(), shape.batch, shape.num_queries, shape.keys, SKIP_TILE
        )
        record["skipped"] = 1.0 - float(kept.sum()) / float(visited.sum() * shape.num_heads)
        print(f"  skipped {record['skipped']:.3f} of the tiles")
    return record | {"results": results, "failures": failures}, torch_calls


def add_device_time(row: dict[str, Any], device_ms: float, ceiling: float) -> None:
    row["device_ms"] = device_ms
    row["tflops"] = row["flops"] / device_ms / 1e9
    row["percent_of_matmul"] = 100 * row["tflops"] * 1e12 / ceiling


def run_timing(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.seconds
    ceiling = matmul_flops_per_second()
    print(f"bf16 matrix product {ceiling / 1e12:.0f} TFLOP/s")
    kind = "-dispatch" if arguments.dispatch else "-skip" * arguments.skip + "-gradients" * arguments.gradients
    record = report.Record(f"attention_gpu{kind}", matmul_flops_per_second=ceiling)
    if arguments.dispatch:
        arguments.gradients = arguments.xla = True
        every = dispatch_shapes()
    else:
        every = skip_shapes() if arguments.skip else gradient_shapes() if arguments.gradients else time_shapes()
    shapes = chosen(every, arguments)
    pool = concurrent.futures.ThreadPoolExecutor(arguments.workers)
    torch_calls = []
    try:
        prepared = [
            {name: pool.submit(prepare) for name, prepare in contestants(shape, arguments).items()} for shape in shapes
        ]
        for shape, futures in zip(shapes, prepared, strict=True):
            if time.monotonic() > deadline:
                print(f"{len(shapes) - len(record.rows)} shapes not reached in {arguments.seconds:.0f} s")
                break
            print(shape.name, flush=True)
            row, calls = measure(shape, futures, arguments, ceiling)
            record.add(row)
            torch_calls.append((row, calls))
            futures.clear()  # frees the arrays
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    # PyTorch's profiler keeps JAX's from the driver ever after, so it comes last.
    for row, calls in torch_calls:
        for name, call in calls.items():
            try:
                add_device_time(row["results"][name], torch_device_ms(call), ceiling)
            except Exception as error:
                row["failures"][f"profile of {name}"] = f"{type(error).__name__}: {str(error)[:300]}"
    record.save()
    summarise(record.rows)
    compare(record)
    return 0 if record.rows else 1


def compare(record: report.Record) -> None:
    """Prints each device time over that of the last committed run of the same shape on the same device."""
    earlier: dict[tuple[str, str], tuple[str, float]] = {}
    files = []
    for path in report.RESULTS.glob("attention_gpu-*.json"):
        if path.resolve() != record.path.resolve():
            files.append(json.loads(path.read_text()))
    device = jax.devices()[0].device_kind
    for content in sorted(files, key=lambda content: content["environment"]["date"]):
        if content["environment"]["device"] == device:
            for row in content["rows"]:
                for name, result in row.get("results", {}).items():
                    if "device_ms" in result:
                        date = content["environment"]["date"][:10]
                        earlier[row["shape"], name] = (date, result["device_ms"])
    for row in record.rows:
        for name, result in row["results"].items():
            if "device_ms" in result and (row["shape"], name) in earlier:
                date, ms = earlier[row["shape"], name]
                print(f"{row['shape']}: {name} takes {result['device_ms'] / ms:.3f} of its time of {date}")


def memory(arguments: argparse.Namespace) -> int:
    """Device memory of one layer at `--length` tokens: what the compiled program asks for, and the peak of a run.

    The peak is that of the process so far, so contestants come in the order of what they need.
    """
    shape = Shape(
        mask=masks.Causal(), batch=1, num_queries=arguments.length, num_heads=32, num_kv_heads=8, head_dim=128
    )
    device = jax.devices()[0]
    record = report.Record("attention_gpu-memory", shape=shape.name, bytes_of_q=2 * shape.num_queries * 32 * 128)
    q, k, v = shape.arrays()
    limits, d_out = shape.make_limits(), jnp.ones_like(q)
    d_lse = jnp.zeros((1, 32, shape.num_queries))
    portable = functools.partial(xla.run, mask=shape.mask, limits=limits, scale=shape.head_dim**-0.5)
    peer = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    calls = {
        "mosaic": (mosaic(shape), (q, k, v, limits)),
        "cudnn": (peer, (q, k, v)),
        "xla": (portable, (q, k, v)),
        "cudnn" + WITH_GRADIENTS: (with_gradients(peer), (q, k, v, d_out)),
        "mosaic" + WITH_GRADIENTS: (with_gradients(mosaic(shape)), (q, k, v, limits, (d_out, d_lse))),
        "xla" + WITH_GRADIENTS: (with_gradients(portable), (q, k, v, (d_out, d_lse))),
    }
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        lowered = {n: pool.submit(lambda f=f, a=a: jax.jit(f).lower(*a).compile()) for n, (f, a) in calls.items()}
    for name, future in lowered.items():
        row: dict[str, Any] = {"name": name}
        try:
            compiled = future.result()
            wanted = compiled.memory_analysis()
            for field in ("argument", "output", "temp"):
                row[f"{field}_bytes"] = getattr(wanted, f"{field}_size_in_bytes")
            if name != "xla" + WITH_GRADIENTS:  # seconds of a run that tells nothing more
                jax.block_until_ready(compiled(*calls[name][1]))
                row["peak_bytes"] = device.memory_stats()["peak_bytes_in_use"]
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error)[:300]}"
        record.add(row)
        print(", ".join(f"{k} {v / 1e9:.2f} GB" if isinstance(v, int) else str(v) for k, v in row.items()), flush=True)
    return 0


def summarise(rows: Iterable[dict[str, Any]]) -> None:
    """Device time of the kernels beside the peers', a line per shape."""
    for ending in ("", WITH_GRADIENTS):
        for row in rows:
            ms = {name: result["device_ms"] for name, result in row["results"].items() if "device_ms" in result}
            ours = ms.get("mosaic" + ending)
            peers = [
                name for name in ms if not name.startswith("mosaic") and name.endswith(WITH_GRADIENTS) == bool(ending)
            ]
            if ours:
                beside = ", ".join(f"{name} {ms[name]:.3f} (ratio {ours / ms[name]:.3f})" for name in peers)
                print(f"{row['shape']}: mosaic{ending} {ours:.3f} ms, {beside}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time", "memory"])
    parser.add_argument("--filter", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--gradients", action="store_true", help="time forward with backward too")
    parser.add_argument("--skip", action="store_true", help="time skipped tiles")
    parser.add_argument("--dispatch", action="store_true", help="time what the automatic choice is derived from")
    parser.add_argument("--length", type=int, default=131072, help="tokens of `memory`")
    parser.add_argument("--xla", action="store_true", help="time the portable path too")
    parser.add_argument("--sweep", action="store_true", help="time other tile sizes too")
    parser.add_argument("--workers", type=int, default=12, help="processes of `check`, compiling threads of `time`")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profiles", type=int, default=5, help="profiles of each contestant, in turn")
    arguments = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"needs an NVIDIA GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 2
    return {"check": check, "time": run_timing, "memory": memory}[arguments.what](arguments)


if __name__ == "__main__":
    sys.exit(main())

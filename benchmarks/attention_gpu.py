"""Attention on a Hopper GPU: first that the kernels are right at real sizes, then how fast they are.

    python -m benchmarks.attention_gpu check                 # every configuration against the float32 definition
    python -m benchmarks.attention_gpu time                  # the tables, peers in the same process
    python -m benchmarks.attention_gpu time --sweep --filter "H=128 causal"   # other tile sizes too

Needs JAX with CUDA and NumPy; PyTorch and tokamax are peers where they are installed. Timing: all contestants of a
shape take turns, `repeats` rounds; one sample is a batch of calls queued back to back, long enough that dispatch is
hidden, divided by their number. `device ms` beside it is the profiler's sum of device time per call. Rates count the
floating-point operations of the pairs that the mask allows, 4 H each forward and 2.5 times that backward, so a
contestant that visits masked tiles shows a lower rate. Percentages refer to a bf16 matrix product measured in the
same run.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the memory

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from pallas_kernels import masks
from pallas_kernels.attention import mosaic_sm90, reference
from pallas_kernels.attention.limits import Limits

Config = mosaic_sm90.Config

# Tile sizes of the sweep, by head dim; the heuristic's choice is always timed.
SWEEP = {
    64: [Config(block_q=64, block_k=128, stages=s) for s in (2, 3, 4)]
    + [Config(block_q=128, block_k=128, stages=3), Config(block_q=64, block_k=256, stages=3)],
    96: [Config(block_q=64, block_k=128, stages=s) for s in (2, 3)],
    128: [Config(block_q=64, block_k=128, stages=2)] + [Config(block_q=64, block_k=64, stages=s) for s in (2, 3, 4, 5)],
    256: [Config(block_q=64, block_k=64, stages=2)],
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

    @property
    def keys(self) -> int:
        return self.num_queries if self.num_keys is None else self.num_keys

    @property
    def name(self) -> str:
        return (
            f"{self.mask} {self.limits} B={self.batch} T={self.num_queries} S={self.keys} N={self.num_heads} "
            f"K={self.num_kv_heads} H={self.head_dim} {self.dtype}"
        ).replace("  ", " ")

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), 3)
        kv_shape = (self.batch, self.keys, self.num_kv_heads, self.head_dim)
        shapes = ((self.batch, self.num_queries, self.num_heads, self.head_dim), kv_shape, kv_shape)
        q, k, v = (jax.random.normal(a, s, self.dtype) for a, s in zip(keys, shapes, strict=True))
        return q, k, v

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
        return 4.0 * self.batch * self.num_heads * self.head_dim * self.pairs()


def mosaic(shape: Shape, config: Config | None = None) -> Callable[..., Any]:
    return jax.jit(
        lambda q, k, v, limits: mosaic_sm90.run(
            q, k, v, mask=shape.mask, limits=limits, scale=shape.head_dim**-0.5, config=config
        )
    )


def chosen(shapes: Iterator[Shape], arguments: argparse.Namespace) -> list[Shape]:
    return [shape for shape in shapes if any(part in shape.name for part in arguments.filter)]


# ---------------------------------------------------------------------------------------------------------------
# Correctness


def check_shapes() -> Iterator[Shape]:
    """Real sizes, every form of masking, and the lengths at which tiles end."""
    shape = functools.partial(Shape, batch=2, num_heads=8, num_kv_heads=2, head_dim=128)
    doubled = masks.BlockDiffusion(2048, 64)
    for head_dim in mosaic_sm90.HEAD_DIMS:
        for dtype in mosaic_sm90.DTYPES:
            for mask in (masks.Causal(), masks.Full(), doubled):
                yield shape(mask=mask, num_queries=4096, head_dim=head_dim, dtype=dtype)
    for mask in (
        masks.SlidingWindow(1000, 4),
        masks.SlidingWindow(64),
        masks.BlockCausal(48),
        masks.PrefixBidirectional(777),
    ):
        for length in (4096, 3001):
            yield shape(mask=mask, num_queries=length)
    for block, clean in ((16, "block"), (48, "block"), (256, "token")):
        yield shape(mask=masks.BlockDiffusion(1500, block, clean), num_queries=3000)
        yield shape(mask=masks.BlockDiffusion(1500, block, clean), num_queries=1500, num_keys=3000)
    for length in (1, 7, 63, 64, 65, 127, 128, 129, 1000):
        yield shape(mask=masks.Causal(), num_queries=length)
        yield shape(mask=masks.Full(), num_queries=length, num_keys=1111, head_dim=64)
    for heads, kv_heads in ((4, 4), (8, 1)):
        yield shape(mask=masks.Causal(), num_queries=1025, num_heads=heads, num_kv_heads=kv_heads)
    yield shape(mask=masks.Causal(), num_queries=500, num_keys=3000)
    yield shape(mask=masks.Causal(), num_queries=3000, num_keys=500)  # the first 2500 rows see nothing
    for limits in ("lengths", "segments", "positions", "lengths segments", "lengths positions"):
        for mask in (masks.Causal(), masks.SlidingWindow(300, 4), masks.Full()):
            yield shape(mask=mask, batch=3, num_queries=2000, limits=limits)


def check_shape(shape: Shape) -> list[dict[str, Any]]:
    """Compares the configurations of one shape with the float32 definition; each of 10 runs must give the same bits."""
    q, k, v = shape.arrays()
    limits = shape.make_limits()
    if limits.kv_lengths is not None:  # garbage in empty slots must not matter
        empty = (jnp.arange(shape.keys) >= limits.kv_lengths[:, None])[:, :, None, None]
        k, v = jnp.where(empty, jnp.nan, k), jnp.where(empty, jnp.nan, v)
    define = jax.jit(functools.partial(reference.run, mask=shape.mask, scale=shape.head_dim**-0.5))
    expected, expected_lse = define(*(x.astype(jnp.float32) for x in (q, k, v)), limits=limits)
    heuristic = mosaic_sm90.heuristic_config(shape.head_dim)
    swept = shape.num_queries >= 4096 and shape.dtype == "bfloat16" and not isinstance(shape.mask, masks.Full)
    rows = []
    for config in dict.fromkeys([heuristic, *(SWEEP[shape.head_dim] if swept else [])]):
        row: dict[str, Any] = {"shape": shape.name, "config": str(config)}
        rows.append(row)
        try:
            call = mosaic(shape, config)
            out, lse = call(q, k, v, limits)
            row["bitwise_repeatable"] = all(
                bool((again == first).all())
                for _ in range(10)
                for first, again in zip((out, lse), call(q, k, v, limits), strict=True)
            )
        except Exception as error:  # one configuration that cannot run must not hide the others
            row |= {"passes": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
            continue
        error = jnp.abs(out.astype(jnp.float32) - expected)
        both_empty = (lse == -jnp.inf) & (expected_lse == -jnp.inf)
        row["max_error"] = float(error.max())
        row["relative_error"] = float(jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))
        row["lse_error"] = float(jnp.where(both_empty, 0.0, jnp.abs(lse - expected_lse)).max())
        row["passes"] = (
            row["max_error"] <= 2e-2  # NaN fails too
            and row["relative_error"] <= 1e-2
            and row["lse_error"] <= 1e-4
            and row["bitwise_repeatable"]
        )
    return rows


def check(arguments: argparse.Namespace) -> int:
    """Checks all shapes, several processes at a time, since most of the time is compilation."""
    record = report.Record("attention_gpu-check")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        running = [pool.submit(check_shape, shape) for shape in chosen(check_shapes(), arguments)]
        for done in concurrent.futures.as_completed(running):
            for row in done.result():
                record.add(row)
                values = ", ".join(f"{name} {value}" for name, value in row.items() if name != "passes")
                print(f"{'ok  ' if row['passes'] else 'FAIL'} {values}", flush=True)
    failed = sum(not row["passes"] for row in record.rows)
    print(f"{len(record.rows)} configurations, {failed} failed")
    return 1 if failed or not record.rows else 0


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


def contestants(shape: Shape, *, sweep: bool) -> dict[str, Callable[[], Any]]:
    """What runs this shape, by name. For a mask that cuDNN does not know it computes a causal one instead."""
    q, k, v = shape.arrays()
    limits = shape.make_limits()
    calls: dict[str, Callable[[], Any]] = {}
    configs = {mosaic_sm90.heuristic_config(shape.head_dim): "mosaic"}
    if sweep:
        for config in SWEEP[shape.head_dim]:
            configs.setdefault(config, f"mosaic {config.block_q}x{config.block_k} stages={config.stages}")
    for config, name in configs.items():
        calls[name] = functools.partial(mosaic(shape, config), q, k, v, limits)
    causal = not isinstance(shape.mask, masks.Full)
    same = isinstance(shape.mask, masks.Causal | masks.Full) and not shape.limits
    cudnn = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"))
    calls["cudnn" if same else "cudnn, causal"] = functools.partial(cudnn, q, k, v)
    if same and importlib.util.find_spec("tokamax"):
        import tokamax

        peer = jax.jit(functools.partial(tokamax.dot_product_attention, is_causal=causal, implementation="mosaic_gpu"))
        calls["tokamax"] = functools.partial(peer, q, k, v)
    if same and importlib.util.find_spec("torch"):
        calls["torch"] = torch_call(shape, causal=causal)
    return calls


def torch_call(shape: Shape, *, causal: bool) -> Callable[[], Any]:
    """PyTorch's scaled_dot_product_attention on arrays of its own, heads before length as it wants them."""
    import torch

    dtype = getattr(torch, shape.dtype)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    lengths = (shape.num_queries, shape.keys, shape.keys)
    q, k, v = (
        torch.randn(shape.batch, length, n, shape.head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        for n, length in zip(heads, lengths, strict=True)
    )

    def call():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=shape.num_heads != shape.num_kv_heads
        )

    return call


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


def measure(shape: Shape, arguments: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    calls, failures = {}, {}
    for name, call in contestants(shape, sweep=arguments.sweep).items():
        try:
            wait_for(call())
        except Exception as error:  # a peer that cannot run a shape is a row of the table, not the end of it
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: {failures[name]}")
            continue
        calls[name] = call
    batch = {}
    for name, call in calls.items():
        sample(call, 3)
        batch[name] = max(2, min(100, int(0.02 / sample(call, 5)) + 1))  # about 20 ms a sample
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = [*calls]
    for turn in range(arguments.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(sample(calls[name], batch[name]))
    results: dict[str, Any] = {}
    for name, call in calls.items():
        row = report.spread(seconds[name])
        flops = shape.flops()
        if name == "cudnn, causal":
            flops = dataclasses.replace(shape, mask=masks.Causal(), limits="").flops()
        row["tflops"] = flops / row["median_ms"] / 1e9
        row["percent_of_matmul"] = 100 * row["tflops"] * 1e12 / ceiling
        if name != "torch":
            profile = report.device_profile(call)
            row["device_ms"] = profile["device_ms"]
            row["operations"] = profile["operations"]
        results[name] = row
        print(
            f"  {name:32s} {row['median_ms']:8.4f} ms [{row['min_ms']:.4f}, {row['max_ms']:.4f}]  "
            f"device {row.get('device_ms', float('nan')):8.4f} ms  {row['tflops']:6.1f} TFLOP/s "
            f"{row['percent_of_matmul']:5.1f} %",
            flush=True,
        )
    return {"shape": shape.name, "pairs": shape.pairs(), "results": results, "failures": failures}


def run_timing(arguments: argparse.Namespace) -> int:
    ceiling = matmul_flops_per_second()
    print(f"bf16 matrix product {ceiling / 1e12:.0f} TFLOP/s")
    record = report.Record("attention_gpu", matmul_flops_per_second=ceiling)
    for shape in chosen(time_shapes(), arguments):
        print(shape.name, flush=True)
        record.add(measure(shape, arguments, ceiling))
    return 0 if record.rows else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--filter", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--sweep", action="store_true", help="time other tile sizes too")
    parser.add_argument("--workers", type=int, default=6, help="processes of `check`")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"needs an NVIDIA GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 2
    return check(arguments) if arguments.what == "check" else run_timing(arguments)


if __name__ == "__main__":
    sys.exit(main())

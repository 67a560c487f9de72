"""Decode attention on a Hopper GPU: first that the kernel is right at real sizes, then how fast it reads the cache.

    python -m benchmarks.decode_attention_gpu check      # a covering set against the float32 definition
    python -m benchmarks.decode_attention_gpu time       # cold caches, peers in the same process
    python -m benchmarks.decode_attention_gpu time --skip    # skipped tiles beside the dense kernel

Needs JAX with CUDA and NumPy; PyTorch is a peer where it is installed.

Timing: one compiled call attends to the layers of a stacked cache one after another, so that each finds its
keys cold: the layers together hold more than 256 MB, five times the L2 cache. `device us` is the profiler's sum over
the kernels of one layer, merge and work list included; `wall us` the median wall time of a call over its layers. GB/s
counts the live keys and values (and scales) of the cache once, and is compared with a device copy measured in the same
run (bytes read plus bytes written).

What to expect, written before the first run: the time of a call is at least its bytes over the copy bandwidth (2.7 TB/s
on the H100 of our other results) plus about 8 us of starts: 8K tokens of one row 33.5 MB 12 + 8 us (60 %), 32K tokens
134 MB 50 + 8 us (86 %), 128K tokens 537 MB 200 + 8 us (96 %); codes half of the bytes' share each. Blocks of 32
queries add partial results, 4 MB written and read: 2 to 3 us.

Skipped tiles, `time --skip`: Qwen3-8B heads, λ = 1 / e, tiles of 128 slots, in 16 chains and in 8. The keys are made so
that a given share of tiles is skipped for certain; the share that was skipped is recorded. `mosaic` and `xla` skip,
`dense` is the dense kernel on the same arrays. Percentages of the copy bandwidth count K once and V of kept tiles only.

Written before the first run. The floor is (2 - skipped) / 2 of the dense call's bytes, over the bandwidth that the
dense kernel reaches, plus the same 8 us. Eight chains of 8 key heads make 64 work items for one row of the batch,
half of the 132 multiprocessors: each of them must draw 47 KB per microsecond, which 160 KB of buffers allow if the
latency of V is hidden. Expected is therefore: 8 rows reach the floor within 15 %; one row within 25 %, and 16 chains
come nearer to it than 8; with nothing skipped the kernel loses 5 to 25 % to the dense one. One row, one query, in us
(dense 56 and 186): 32K tokens at 50, 75, 90 % 44, 38, 34 (floor) and at most 55, 47, 43; 128K tokens 142, 120, 107
and at most 177, 150, 133. Below about 8K tokens, 8 tiles per chain, starts and the merge outweigh what is saved.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the memory

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.decode_forward import copy_bandwidth
from pallas_kernels import decode_attention, masks
from pallas_kernels.attention.skip import DECODE_TILE, SkipTile
from pallas_kernels.decode_attention import mosaic_sm90, reference, xla

QUERY_BIAS = 8.0
LOG_THRESHOLD = -1.0  # λ = 1 / e; when timed, margins are about 0 in large tiles and -11 in small ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call. B batch, T queries, S slots, K key heads of G query heads each, H head dim."""

    batch: int = 2
    num_queries: int = 1
    capacity: int = 8448
    live: int | None = None  # None: ragged lengths
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"
    cache: str = ""  # dtype of the codes; empty: that of the queries
    scales: str = "token"  # or "head"; of codes
    own: str = "full"  # own keys and their mask: "full", "causal", "block" or "" for none
    own_lengths: bool = False
    ring: bool = False  # a sink and ring cache that has wrapped, with its positions
    window: int | None = None
    small: float | None = None  # with skipped tiles: the share of tiles whose scores are small, hence skipped
    chains: int = DECODE_TILE.chains
    chained: bool = False  # with skipped tiles: outputs serve as queries, and no margin is near the threshold
    layers: int = 2

    @property
    def name(self) -> str:
        values = [f"B={self.batch} T={self.num_queries} S={self.capacity} K={self.kv_heads} G={self.group}"]
        values += [f"H={self.head_dim}", self.dtype]
        values += [f"{self.cache} per {self.scales}"] if self.cache else []
        values += [f"own {self.own}" if self.own else "no own"]
        values += [name for name in ("own_lengths", "ring") if getattr(self, name)]
        values += [f"window {self.window}"] if self.window else []
        values += ["ragged" if self.live is None else f"live {self.live}"]
        values += [f"skipping 128 chains {self.chains}, {self.small} small"] if self.small is not None else []
        return " ".join(values)

    def bytes(self) -> int:
        """Of the live part of one layer's cache."""
        live = self.capacity if self.live is None else self.live
        if self.window is not None:
            live = min(live, self.window + 4)
        codes = 2 * self.batch * live * self.kv_heads * self.head_dim
        if not self.cache:
            return codes * jnp.dtype(self.dtype).itemsize
        return codes + (2 * 4 * self.batch * live * self.kv_heads if self.scales == "token" else 0)

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """The arrays of a call; empty slots hold NaN."""
        keys = iter(jax.random.split(jax.random.key(seed), 9))
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, self.capacity + 1, self.batch) if self.live is None else [self.live] * self.batch
        given: dict[str, Any] = {"kv_lengths": np.asarray(lengths, np.int32)}
        if self.ring:
            num_sinks, ring = 4, self.capacity - 4
            slots = np.arange(self.capacity)
            # The first row has not filled its cache, the others have wrapped.
            total = np.asarray([self.capacity // 2] + [2 * self.capacity + 37 * b for b in range(1, self.batch)])
            newest = total[:, None] - 1
            turn = (newest - num_sinks) // ring
            positions = num_sinks + turn * ring + (slots - num_sinks)
            positions = np.where(positions > newest, positions - ring, positions)
            positions = np.where(slots < num_sinks, slots, positions)
            given["k_positions"] = np.where((positions < 0) | (slots >= total[:, None]), -1, positions).astype(np.int32)
            given["kv_lengths"] = total.astype(np.int32)
            given |= {"window": self.window or ring, "num_sinks": num_sinks}
            given["q_positions"] = (total[:, None] + np.arange(self.num_queries)).astype(np.int32)
        elif self.window is not None:
            given |= {"window": self.window, "num_sinks": 4}
        empty = np.arange(self.capacity) >= given["kv_lengths"][:, None]
        if self.ring:
            empty |= given["k_positions"] < 0
        shape = (self.layers, self.batch, self.capacity, self.kv_heads, self.head_dim)

        @functools.partial(jax.jit, static_argnums=1)
        def fill(key, dtype, empty):
            empty = empty[None, :, :, None, None]
            if dtype == "int8":
                return jnp.where(empty, 127, jax.random.randint(key, shape, -127, 128, jnp.int8))
            x = jax.random.normal(key, shape, jnp.bfloat16) * (64 if self.cache else 1)
            return jnp.where(empty, jnp.nan, x).astype(dtype)

        cache = self.cache or self.dtype
        given |= {"k_cache": fill(next(keys), cache, empty), "v_cache": fill(next(keys), cache, empty)}
        if self.cache:
            per_token = self.scales == "token"
            scale_shape = (self.layers, self.batch, self.kv_heads, self.capacity) if per_token else shape[::3][:2]
            for name in ("k_scale", "v_scale"):
                scales = jax.random.uniform(next(keys), scale_shape, jnp.float32, 0.007, 0.02)
                given[name] = jnp.where(empty[None, :, None], jnp.nan, scales) if per_token else scales
        given["q"] = jax.random.normal(
            next(keys), (self.batch, self.num_queries, self.kv_heads * self.group, self.head_dim), self.dtype
        )
        if self.small is not None:
            given = self.with_small_tiles(given)
        if self.own:
            own_shape = (self.batch, self.num_queries, self.kv_heads, self.head_dim)
            given |= {name: jax.random.normal(next(keys), own_shape, self.dtype) for name in ("own_k", "own_v")}
            if self.own_lengths:
                given["own_lengths"] = rng.integers(0, self.num_queries + 1, self.batch).astype(np.int32)
            if self.chained:
                given["own_v"] = given["own_v"].at[..., 0].set(QUERY_BIAS)
        return given

    def with_small_tiles(self, given: dict[str, Any]) -> dict[str, Any]:
        """The first element of a query is large, and that of a key decides how large the score is.

        If outputs serve as queries, that of a value is large, too.
        """
        rng = np.random.default_rng(1)
        small = rng.random(-(-self.capacity // 128)) < self.small
        small[: self.chains] = False  # the first tiles set the maximum that the others are measured by
        # Else the margins of large tiles lie on both sides of the threshold.
        large, noise = (8.0, 0.25) if self.chained else (rng.uniform(2.0, 8.0, small.shape), 1.0)
        bias = np.repeat(np.where(small, -8.0, large), 128)[: self.capacity, None]

        @functools.partial(jax.jit, donate_argnums=0)
        def put(cache, first, factor):
            cache = (cache * factor).astype(cache.dtype)
            return cache.at[..., 0].set(jnp.where(jnp.isnan(cache[..., 0]), jnp.nan, first).astype(cache.dtype))

        given = given | {
            "q": given["q"].at[..., 0].set(QUERY_BIAS),
            "k_cache": put(given["k_cache"], bias, noise),
        }
        return given | {"v_cache": put(given["v_cache"], QUERY_BIAS, 1.0)} if self.chained else given

    def skip_options(self, log_threshold: float = LOG_THRESHOLD) -> dict[str, Any]:
        if self.small is None:
            return {}
        # An array: 0 then means dense.
        return {
            "skip_threshold": jnp.float32(np.exp(log_threshold)),
            "skip_tile": SkipTile(width=128, chains=self.chains),
        }

    def own_mask(self) -> masks.Mask:
        return {"causal": masks.Causal(), "block": masks.BlockCausal(8)}.get(self.own, masks.Full())

    def call(self, implementation: str, *, log_threshold: float = LOG_THRESHOLD) -> Callable[..., Any]:
        """Attention of the queries to one layer: `call(layer, arguments)`.

        With small tiles it returns their statistics too, and "dense" is the dense kernel.
        """
        own_mask = self.own_mask()
        options = self.skip_options(log_threshold) if implementation != "dense" else {}
        name = "mosaic" if implementation == "dense" else implementation
        if self.small is not None:
            options["return_stats"] = implementation != "dense"

        def call(layer, arguments):
            return decode_attention(
                layer=layer, own_mask=own_mask, return_lse=True, implementation=name, **options, **arguments
            )

        return call


# ---------------------------------------------------------------------------------------------------------------
# Correctness


def check_shapes() -> Iterator[Shape]:
    """Every feature at least once, the common ones at each number of queries."""
    for num_queries in (1, 4, 16, 32, 64):
        yield Shape(num_queries=num_queries, batch=3)
    for group in (1, 8):
        yield Shape(group=group, num_queries=1)
        yield Shape(group=group, num_queries=32)
    for cache in ("int8", "float8_e4m3fn"):
        for scales in ("head", "token"):
            yield Shape(cache=cache, scales=scales, num_queries=1, batch=3)
            yield Shape(cache=cache, scales=scales, num_queries=32)
        yield Shape(cache=cache, num_queries=4, head_dim=64, ring=True)
    yield Shape(ring=True, batch=3, own="causal")
    yield Shape(ring=True, num_queries=32, own="causal", capacity=4096)
    yield Shape(ring=True, num_queries=16, window=700)
    yield Shape(window=1000, num_queries=32, own="causal")
    yield Shape(window=1000, num_queries=1, own="")
    yield Shape(own="block", num_queries=16, own_lengths=True, batch=5)
    yield Shape(own="", num_queries=7, dtype="float16")
    yield Shape(dtype="float16", num_queries=32, head_dim=64)
    for head_dim in (64, 96, 256):
        yield Shape(head_dim=head_dim, num_queries=1)
        yield Shape(head_dim=head_dim, num_queries=32, capacity=2048)
    yield Shape(batch=64, capacity=1024, num_queries=1)
    yield Shape(batch=1, capacity=32768, live=32768, num_queries=32)
    yield Shape(batch=1, capacity=64, live=0, num_queries=1, own="")  # nothing to see
    for num_queries in (1, 4, 16, 32, 64):
        yield Shape(num_queries=num_queries, batch=3, small=0.5)
    for small in (0.0, 0.9):
        yield Shape(batch=1, capacity=32768, live=32768, small=small)
        yield Shape(batch=1, capacity=32768, live=32768, num_queries=32, small=small, chains=8)
    yield Shape(batch=3, num_queries=32, group=8, small=0.5, own="causal")
    yield Shape(batch=3, num_queries=7, group=1, small=0.5, own="", chains=3)
    yield Shape(batch=1, capacity=32768, live=32768, small=0.75, chains=8)
    yield Shape(batch=5, num_queries=16, own="block", own_lengths=True, small=0.5)
    yield Shape(batch=3, num_queries=4, dtype="float16", small=0.5)
    for head_dim in (64, 96):
        yield Shape(head_dim=head_dim, num_queries=1, small=0.5)
        yield Shape(head_dim=head_dim, num_queries=32, small=0.5)
    yield Shape(batch=64, capacity=1024, num_queries=1, small=0.5)


def check_shape(shape: Shape) -> dict[str, Any]:
    """Compares one shape with the float32 definition; the layer is traced, three runs must give the same bits."""
    arguments = shape.arguments()
    wide = {
        name: x.astype(jnp.float32) if str(getattr(x, "dtype", "")) in ("bfloat16", "float16") else x
        for name, x in arguments.items()
    }
    if shape.small is None:
        expected, expected_lse = jax.jit(shape.call("reference"))(jnp.int32(1), wide)
    row: dict[str, Any] = {"shape": shape.name, "config": "mosaic"}
    try:
        call = jax.jit(shape.call("mosaic")) if shape.small is None else with_decisions(shape, "mosaic")
        out, lse, *kept = call(jnp.int32(1), arguments)
        row["bitwise_repeatable"] = all(
            bool((again == first).all())
            for _ in range(3)
            for first, again in zip((out, lse, *kept), call(jnp.int32(1), arguments), strict=True)
        )
        if kept:
            row |= check_decisions(shape, arguments, kept[0])
            expected, expected_lse = jax.jit(by_decisions(shape))(jnp.int32(1), wide, kept[0])
    except Exception as error:  # one shape that cannot run must not hide the others
        return row | {"passes": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    error = jnp.abs(out.astype(jnp.float32) - expected)
    both_empty = (lse == -jnp.inf) & (expected_lse == -jnp.inf)
    row["max_error"] = float(error.max())
    row["relative_error"] = float(jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))
    row["lse_error"] = float(jnp.where(both_empty, 0.0, jnp.abs(lse - expected_lse)).max())
    row["passes"] = (
        row["max_error"] <= 2e-2  # NaN fails too
        and row["relative_error"] <= 1e-2
        and row["lse_error"] <= 2e-4
        and row["bitwise_repeatable"]
        and not row.get("wrong_decisions")
    )
    return row


@functools.cache
def with_decisions(shape: Shape, implementation: str, log_threshold: float = LOG_THRESHOLD) -> Callable[..., Any]:
    """Jitted `call(layer, arguments)`: output, log-sum-exp and which tiles were kept, bool [B, K, tiles]."""
    module = {"mosaic": mosaic_sm90, "xla": xla}[implementation]
    call = shape.call(implementation, log_threshold=log_threshold)

    @jax.jit
    def decide(layer, arguments):
        kept = []

        def run(*args, original=module.run, **options):
            results = original(*args, **options)
            kept.append(results[2])
            return results

        with mock.patch.object(module, "run", run):
            out, lse, _ = call(layer, arguments)
        return out, lse, kept[0]

    return decide


def by_decisions(shape: Shape) -> Callable[..., Any]:
    """The definition under given decisions: `call(layer, arguments, kept)`, output and log-sum-exp."""
    call = shape.call("reference")

    def attend(layer, arguments, kept):
        with mock.patch.object(reference, "keep_tiles", lambda *_: kept):
            return call(layer, arguments)[:2]

    return attend


def check_decisions(shape: Shape, arguments: dict[str, Any], kept: jax.Array) -> dict[str, Any]:
    """Compares decisions with those of the XLA path where rounding cannot decide otherwise."""
    more, fewer = (
        with_decisions(shape, "xla", LOG_THRESHOLD + shift)(jnp.int32(1), arguments)[2] for shift in (-1e-2, 1e-2)
    )
    visited = with_decisions(shape, "xla", -1e3)(jnp.int32(1), arguments)[2]
    wrong = (kept != more) & (more == fewer)
    return {"wrong_decisions": int(wrong.sum()), "skipped": 1.0 - float(kept.sum() / jnp.maximum(visited.sum(), 1))}


def check(arguments: argparse.Namespace) -> int:
    """Checks all shapes, several processes at a time, since most of the time is compilation."""
    record = report.Record("decode_attention_gpu-check")
    shapes = [shape for shape in check_shapes() if any(part in shape.name for part in arguments.filter)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        for done in concurrent.futures.as_completed([pool.submit(check_shape, shape) for shape in shapes]):
            row = done.result()
            record.add(row)
            values = ", ".join(f"{name} {value}" for name, value in row.items() if name != "passes")
            print(f"{'ok  ' if row['passes'] else 'FAIL'} {values}", flush=True)
    failed = sum(not row["passes"] for row in record.rows)
    print(f"{len(record.rows)} shapes, {failed} failed")
    return 1 if failed or not record.rows else 0


# ---------------------------------------------------------------------------------------------------------------
# Speed


def time_shapes(gigabytes: float) -> Iterator[Shape]:
    """Heads of Qwen3-8B, most telling first; each cache of all layers is 0.27 to `gigabytes` GB."""
    kinds = (("", "token"), ("int8", "token"), ("float8_e4m3fn", "head"))
    for live, batch in ((32768, 1), (8192, 1), (131072, 1), (8192, 8), (8192, 64), (32768, 8), (131072, 8)):
        for cache, scales in kinds:
            for num_queries in (1, 32):
                shape = Shape(
                    batch=batch, num_queries=num_queries, capacity=live, live=live, cache=cache, scales=scales
                )
                layers = max(2, -(-(270 * 10**6) // shape.bytes()))
                shape = dataclasses.replace(shape, layers=layers)
                if layers * shape.bytes() <= gigabytes * 1e9:
                    yield shape
    # Classes that the automatic choice does not take yet.
    for options in (
        {"ring": True},
        {"window": 4096},
        {"num_queries": 64},
        {"head_dim": 64},
        {"head_dim": 256},
        {"dtype": "float16"},
    ):
        shape = Shape(**({"batch": 1, "num_queries": 32, "capacity": 32768, "live": 32768} | options))
        yield dataclasses.replace(shape, layers=max(2, -(-(270 * 10**6) // shape.bytes())))


def skip_shapes() -> Iterator[Shape]:
    """Half, nine tenths, three quarters and none of the tiles left out; the same heads, most telling first."""
    # slots, batch, queries, chains
    calls = (
        (32768, 1, 1, 16), (131072, 1, 1, 16), (32768, 8, 1, 16), (32768, 1, 32, 16), (131072, 8, 1, 16),
        (32768, 8, 32, 16), (131072, 1, 32, 16), (32768, 1, 1, 8), (131072, 1, 1, 8), (32768, 8, 1, 8),
    )  # fmt: skip
    for live, batch, num_queries, chains in calls:
        for small in (0.5, 0.9, 0.75, 0.0):
            shape = Shape(batch=batch, num_queries=num_queries, capacity=live, live=live, small=small, chains=chains)
            layers = max(2, -(-(270 * 10**6) // shape.bytes()))
            yield dataclasses.replace(shape, layers=layers, chained=True)


@functools.cache
def over_layers(shape: Shape, implementation: str) -> Callable[[dict[str, Any]], Any]:
    """Attention to all layers, each with the output of the one before as its queries."""
    call = shape.call(implementation)

    @jax.jit
    def run(arguments):
        for layer in range(shape.layers):  # written out, as models do on a GPU: the work list is then made once
            arguments = arguments | {"q": call(layer, arguments)[0]}
        return arguments["q"]

    return run


def cudnn_over_layers(shape: Shape, arguments: dict[str, Any]) -> Callable[[], Any]:
    """cuDNN over arrays of one layer each, the own keys left out."""
    caches = [(arguments["k_cache"][i], arguments["v_cache"][i]) for i in range(shape.layers)]

    @jax.jit
    def run(q, caches, lengths):
        for k, v in caches:
            q = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
        return q

    return functools.partial(run, arguments["q"], caches, jnp.asarray(arguments["kv_lengths"]))


def torch_ms(shape: Shape) -> float:
    """Milliseconds per layer of PyTorch's scaled_dot_product_attention, without own keys, as one CUDA graph."""
    import torch

    def make(heads, length):
        size = (shape.batch, heads, length, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=getattr(torch, shape.dtype))

    q = make(shape.kv_heads * shape.group, shape.num_queries)
    caches = [[make(shape.kv_heads, shape.capacity) for _ in range(2)] for _ in range(shape.layers)]

    def call():
        for k, v in caches:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=shape.group > 1)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[len(times) // 2] / shape.layers


def measure(shape: Shape, bandwidth: float, *, peers: bool) -> dict[str, Any]:
    arguments = shape.arguments()
    # One program for all shares of small tiles.
    program = shape if shape.small is None else dataclasses.replace(shape, small=0.0)
    calls: dict[str, Callable[[], Any]] = {"mosaic": functools.partial(over_layers(program, "mosaic"), arguments)}
    if shape.small is not None:
        calls["dense"] = functools.partial(over_layers(program, "dense"), arguments)
        kept = with_decisions(program, "mosaic")(jnp.int32(0), arguments)[2]
        skipped = 1.0 - float(kept.mean())  # every tile is visited
    if peers:
        calls["xla"] = functools.partial(over_layers(program, "xla"), arguments)
        if shape.small is None and not shape.cache and not shape.ring and shape.window is None:
            calls["cudnn"] = cudnn_over_layers(shape, arguments)
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            row = report.timed(call, repeats=10, warm_up=2)
            profile = report.device_profile(call, calls=3)
        except Exception as error:  # a peer that cannot run a shape is a row of the table, not the end of it
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: {failures[name]}", flush=True)
            continue
        row |= {"device_us": 1e3 * profile["device_ms"] / shape.layers, "operations": profile["operations"]}
        row["wall_us"] = 1e3 * row["median_ms"] / shape.layers
        results[name] = row
    has_peers = "cudnn" in calls
    calls.clear()
    del arguments
    if has_peers and importlib.util.find_spec("torch"):
        try:
            results["torch"] = {"device_us": 1e3 * torch_ms(shape), "wall_us": float("nan")}
        except Exception as error:
            failures["torch"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  torch: {failures['torch']}", flush=True)
    for name, row in results.items():
        read = shape.bytes()
        if shape.small is not None and name != "dense":
            read = read * (2 - skipped) / 2
        row["gb_per_second"] = read / row["device_us"] / 1e3
        row["percent_of_copy"] = 100 * row["gb_per_second"] * 1e9 / bandwidth
        print(
            f"  {name:20s} device {row['device_us']:9.1f} us  wall {row['wall_us']:9.1f} us  "
            f"{row['gb_per_second']:6.0f} GB/s {row['percent_of_copy']:5.1f} %",
            flush=True,
        )
    record = {"shape": shape.name, "layers": shape.layers, "bytes": shape.bytes(), "results": results,
              "failures": failures}  # fmt: skip
    if shape.small is not None:
        record["skipped"] = skipped
        print(f"  skipped {skipped:.3f} of the tiles", flush=True)
    return record


def run_timing(arguments: argparse.Namespace) -> int:
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    record = report.Record("decode_attention_gpu", copy_bytes_per_second=bandwidth)
    shapes = skip_shapes() if arguments.skip else time_shapes(arguments.gigabytes)
    deadline = time.monotonic() + arguments.seconds
    for shape in shapes:
        if time.monotonic() > deadline:
            print(f"not reached in {arguments.seconds:.0f} s: {shape.name} and what follows", flush=True)
            break
        if any(part in shape.name for part in arguments.filter):
            print(shape.name, flush=True)
            record.add(measure(shape, bandwidth, peers=not arguments.no_peers))
    return 0 if record.rows else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--filter", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--workers", type=int, default=6, help="processes of `check`")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="largest cache that `time` allocates")
    parser.add_argument("--skip", action="store_true", help="time skipped tiles")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new shape is timed after this")
    parser.add_argument("--no-peers", action="store_true", help="time the kernel only")
    arguments = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(f"needs an NVIDIA GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 2
    if (reason := mosaic_sm90.compat.missing_hopper()) is not None:
        print(reason, file=sys.stderr)
        return 2
    return check(arguments) if arguments.what == "check" else run_timing(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Block-routed attention on a Hopper GPU: first that it is right at real sizes, then how long it takes.

    python -m benchmarks.moba check
    python -m benchmarks.moba time --lengths 8192 65536 --peers cudnn torch xla

Needs JAX with CUDA and NumPy; PyTorch for the peer "torch" (its flash backend).

`check` compares some queries, the first and last of all among them, with NumPy in float64: that no block left out has a
score above one selected by more than rounding explains, and output and log-sum-exp over the blocks that were selected;
gradients with those of the portable path in float32.

`time` has the published setting: batch 2, 16 heads of 128, causal, blocks of 128, 8 of them. `device ms` is the
profiler's sum over all kernels of a call. Peers are dense attention in the same process, "xla" is the portable path,
which has the formulation of the first MoBA release: routed and own blocks apart, merged by log-sum-exp.

An estimate for 65,536 tokens, by arithmetic and written before the first run; nothing in it was measured. Per head 459
thousand pairs of a query and a past block: 117 MB of gathered queries are written and read, and as much of partial
outputs: 0.47 GB, for 32 heads 15 GB or 4 ms of an assumed 4 TB/s. The products are 1.0 TFLOP, 2 to 3 ms. Routing scores
0.14 TFLOP and takes the best 7 of some 256 in 1 to 2 ms. Sorts and lists of 15 million pairs 2 to 6 ms. Together 10 to
16 ms; the 35 TFLOP of dense attention take 54 at an assumed 650 TFLOP/s. What was measured stands in the README of the
operation. The kernels have since come to read queries in place.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from pallas_kernels import compat
from pallas_kernels.moba import moba_attention

PEERS = ("cudnn", "torch", "xla")
SAMPLES = 48  # queries of each head that a check looks at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int = 1
    length: int = 4096
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 128
    block_size: int = 128
    top_k: int = 8
    dtype: str = "bfloat16"
    segments: int = 1  # sequences of a row, of different lengths

    @property
    def name(self) -> str:
        packed = f" {self.segments} segments" if self.segments > 1 else ""
        return (
            f"B={self.batch} T={self.length} N={self.heads} K={self.kv_heads} H={self.head_dim} {self.dtype} "
            f"block={self.block_size} k={self.top_k}{packed}"
        )

    def arguments(self, seed: int = 0) -> tuple[Any, Any, Any]:
        """Keys that drift, so that blocks have means of their own."""
        keys = jax.random.split(jax.random.key(seed), 4)

        @functools.partial(jax.jit, static_argnums=1)
        def normal(key, heads):
            return jax.random.normal(key, (self.batch, self.length, heads, self.head_dim), jnp.float32)

        drift = jnp.repeat(normal(keys[3], self.kv_heads)[:, ::64], 64, axis=1)[:, : self.length]
        q, k, v = (normal(key, heads) for key, heads in zip(keys, (self.heads, self.kv_heads, self.kv_heads)))
        return q.astype(self.dtype), (k + 0.3 * drift).astype(self.dtype), v.astype(self.dtype)

    def segment_ids(self) -> np.ndarray | None:
        if self.segments == 1:
            return None
        ends = np.sort(np.random.default_rng(1).choice(self.length, self.segments, replace=False))
        ids = np.searchsorted(ends, np.arange(self.length), side="right")
        return np.tile(np.where(ids == self.segments, -1, ids), (self.batch, 1))  # what is left is padding

    def call(self, implementation: str) -> Callable[..., Any]:
        ids = self.segment_ids()
        options = {"segment_ids": None if ids is None else jnp.asarray(ids)}
        return functools.partial(
            moba_attention, block_size=self.block_size, top_k=self.top_k, implementation=implementation, **options
        )


def check_shape(shape: Shape) -> dict[str, Any]:
    q, k, v = shape.arguments()
    call = jax.jit(functools.partial(shape.call("mosaic"), return_lse=True, return_selection=True))
    out, lse, indices = (np.asarray(x.astype(jnp.float32) if x.dtype != jnp.int32 else x) for x in call(q, k, v))
    again = call(q, k, v)
    row: dict[str, Any] = {"shape": shape.name, "bitwise_repeatable": bool((np.asarray(again[2]) == indices).all())}
    row["bitwise_repeatable"] &= bool((np.asarray(again[0].astype(jnp.float32)) == out).all())
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    ids = shape.segment_ids()
    rng = np.random.default_rng(0)
    squares, errors, lse_error, wrong, gap = 0.0, 0.0, 0.0, 0, 0.0
    for b, n in np.ndindex(shape.batch, shape.heads):
        head = n // (shape.heads // shape.kv_heads)
        for t in np.r_[0, 1, shape.block_size, shape.length - 1, rng.integers(0, shape.length, SAMPLES)]:
            first = 0
            if ids is not None:
                if ids[b, t] < 0:
                    errors += np.abs(out[b, t, n]).sum()
                    continue
                first = int(np.argmax(ids[b] == ids[b, t]))
            own, chosen = (t - first) // shape.block_size, indices[b, t, n]
            blocks = k[b, first : first + own * shape.block_size, head].reshape(own, shape.block_size, shape.head_dim)
            means = np.asarray(jnp.asarray(blocks.mean(axis=1).astype(np.float32)).astype(shape.dtype), np.float64)
            scores = means @ q[b, t, n]
            past = chosen[1:][chosen[1:] >= 0]
            right = len(set(past)) == len(past) == min(own, shape.top_k - 1) and chosen[0] == own and (past < own).all()
            wrong += not right
            if not right:
                continue
            left_out = np.setdiff1d(np.arange(own), past)
            if left_out.size and past.size:
                gap = max(gap, scores[left_out].max() - scores[past].min())
            keys = np.concatenate(
                [np.arange(c * shape.block_size, (c + 1) * shape.block_size) for c in past]
                + [np.arange(own * shape.block_size, t - first + 1)]
            ).astype(int)
            s = k[b, first + keys, head] @ q[b, t, n] * shape.head_dim**-0.5
            p = np.exp(s - s.max())
            expected = p @ v[b, first + keys, head] / p.sum()
            squares, errors = squares + (expected**2).sum(), errors + ((out[b, t, n] - expected) ** 2).sum()
            lse_error = max(lse_error, abs(lse[b, n, t] - (np.log(p.sum()) + s.max())))
    row |= {"error": float(np.sqrt(errors / squares)), "lse_error": float(lse_error), "wrong_selections": int(wrong)}
    # Means are rounded to the dtype of keys here from float64 and there from float32.
    row["largest_gap"] = float(gap)
    row["passes"] = bool(
        row["bitwise_repeatable"] and wrong == 0 and row["error"] < 6e-3 and lse_error < 2e-3 and gap < 0.05
    )
    return row


def gradient_errors(shape: Shape) -> dict[str, Any]:
    """Relative errors of the gradients of bfloat16 arguments, against the same arguments in float32."""
    arguments = shape.arguments()
    weights = jax.random.normal(jax.random.key(9), arguments[0].shape)

    def gradients(implementation):
        def loss(q, k, v):
            return (shape.call(implementation)(q, k, v).astype(jnp.float32) * weights).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    call = gradients("mosaic")
    found, again = call(*arguments), call(*arguments)
    with jax.default_matmul_precision("highest"):
        right = gradients("xla")(*arguments)
    errors: dict[str, Any] = {
        f"d{name}_error": float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for name, a, b in zip("qkv", found, right, strict=True)
    }
    errors["gradients_repeatable"] = all(bool((a == b).all()) for a, b in zip(found, again, strict=True))
    return errors


def check_shapes() -> Iterator[Shape]:
    yield Shape(head_dim=64, heads=4)
    yield Shape(length=8192, segments=5, batch=2)
    yield Shape()
    yield Shape(head_dim=64, block_size=64, top_k=16, heads=4, kv_heads=4)
    yield Shape(length=4999, dtype="float16", heads=3)
    yield Shape(length=5000, block_size=256, top_k=4, batch=2)
    yield Shape(length=65536, heads=4, kv_heads=2)
    yield Shape(length=4096, top_k=1)
    yield Shape(length=2048, block_size=512, top_k=2, head_dim=64)


def check(filters: list[str]) -> int:
    record = report.Record("moba-check")
    for shape in check_shapes():
        if not any(part in shape.name for part in filters):
            continue
        try:
            row = check_shape(shape)
            if shape.length <= 8192:
                row |= gradient_errors(shape)
                right = all(row[f"d{name}_error"] < 8e-3 for name in "qkv")  # NaN is not
                row["passes"] = row["passes"] and row["gradients_repeatable"] and right
        except Exception as error:  # one shape that fails is a row, not the end of the check
            row = {"shape": shape.name, "failure": f"{type(error).__name__}: {str(error)[:300]}", "passes": False}
        record.add(row)
        print("ok  " if row["passes"] else "FAIL", row, flush=True)
    failed = sum(not row["passes"] for row in record.rows)
    print(f"{len(record.rows)} shapes, {failed} failed")
    return 1 if failed or not record.rows else 0


# ---------------------------------------------------------------------------------------------------------------
# Speed


def measured(call: Callable[[], Any], *, repeats: int, warm_up: int, profiled: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict(report.timed(call, repeats=repeats, warm_up=warm_up))
    if not profiled:
        return row
    profile = report.device_profile(call, calls=2)
    return row | {"device_ms": profile["device_ms"], "operations": profile["operations"]}


def torch_ms(shape: Shape, gradients: bool, *, repeats: int, warm_up: int) -> dict[str, Any]:
    """PyTorch's flash backend, which is FlashAttention-2 on this hardware; by CUDA events."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=gradients) for _ in range(3))
    d_out = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    times = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for _ in range(warm_up + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            if gradients:
                torch.autograd.grad(out, (q, k, v), d_out)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return report.spread(times[warm_up:])


def measure(shape: Shape, peers: list[str], gradients: bool) -> dict[str, Any]:
    q, k, v = shape.arguments()
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    calls = {"mosaic": shape.call("mosaic"), "xla": shape.call("xla"), "cudnn": dense}
    for name in ("mosaic", *peers):
        for backward in (False, True) if gradients else (False,):
            # Dense attention to long rows takes seconds, and spreads by less than its difference to the kernel.
            long_peer = name != "mosaic" and (name == "xla" or shape.length > 131072)
            times = {"repeats": 3 if long_peer else 20, "warm_up": 1 if long_peer else 2}
            try:
                if name == "torch":
                    row = torch_ms(shape, backward, **times)
                else:
                    function = calls[name]
                    if backward:
                        loss = lambda q, k, v, f=function: f(q, k, v).astype(jnp.float32).sum()  # noqa: E731
                        function = jax.grad(loss, argnums=(0, 1, 2))
                    jitted = jax.jit(function)
                    row = measured(lambda f=jitted: f(q, k, v), **times, profiled=not long_peer)
                    analysis = jitted.lower(q, k, v).compile().memory_analysis()
                    row["temporary_bytes"] = analysis.temp_size_in_bytes
            except Exception as error:  # a peer that cannot run a shape is a row of the table, not the end of it
                failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"  {name}: {failures[name]}", flush=True)
                continue
            results[name + " + gradients" * backward] = row
            print(
                f"  {name + ' + gradients' * backward:20s} {row['median_ms']:9.3f} ms  device "
                f"{row.get('device_ms', 0):9.3f}",
                flush=True,
            )
            for operation in row.get("operations", []) if name == "mosaic" else []:
                print(f"      {100 * operation['share']:5.1f} %  {operation['ms']:8.3f} ms  {operation['name'][:80]}")
    return {"shape": shape.name, "results": results, "failures": failures, "clocks": report.clocks()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--filter", nargs="+", default=[""], help="check only shapes whose name contains one of these")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["cudnn", "torch"])
    parser.add_argument("--gradients", action="store_true", help="also the gradients of q, k and v")
    arguments = parser.parse_args(argv)
    if "torch" in arguments.peers:  # whose arrays lie beside those of JAX
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if (reason := compat.missing_hopper()) is not None:
        print(reason, file=sys.stderr)
        return 2
    if arguments.what == "check":
        return check(arguments.filter)
    record = report.Record("moba")
    for length in arguments.lengths:
        shape = Shape(batch=2, length=length, heads=16, kv_heads=16)
        print(shape.name, flush=True)
        record.add(measure(shape, arguments.peers, arguments.gradients))
    return 0


if __name__ == "__main__":
    sys.exit(main())

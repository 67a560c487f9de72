"""Milliseconds per forward of a decoder with random weights: one token, and one block, against a filled cache.

    python -m benchmarks.decode_forward --preset qwen3_8b --lengths 1024 8192 --block 32

One forward reads every weight and the live cache once, so its floor is those bytes over the measured copy bandwidth. An
autoregressive step is forward + append + argmax; a denoising step is a forward over `block` tokens that only reads the
cache, plus the argmax and the log-sum-exp of every position; one jitted call each, cache donated. A "chunk" is several
autoregressive steps in one call, as the text engine decodes, and its times are those of one of its steps: the host's
part of a call is then shared by all. "queued" is the time per forward of 20 calls that nothing waits for but the last,
as that engine runs ahead of what it reads: the host's part is then hidden behind the device's. The profile lists every
device operation above 2 % and how long the device was idle before it. `--attention` forces an implementation of the
attention to the cache; without it the automatic choice runs. `--weights` takes the linears of all blocks in several
formats in turn: int4 in groups of 128 with zeros, and the same behind ParoQuant's scales and rotations ("paroquant");
embedding and head stay bfloat16, but that `--heads int8` rounds the head.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from jaxmodels import qwen
from jaxmodels.cache import KVCache
from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.quantization.whole import round_head, round_params
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.masks import Full
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation

# The layers scanned, written out over slices of the stacked arrays, over arrays of their own, as decoders take them
# (`for_decoding`: quantized weights stay in stacks), and over arrays of their own throughout.
PATHS = ("scanned", "unrolled", "unstacked", "apart")
STEPS = ("ar", "chunk", "block")
CHUNK = 8  # steps of one call
WEIGHTS = ("bfloat16", "int4", "paroquant")
HEADS = ("bfloat16", "int8")
GROUP_SIZE, ROTATIONS = 128, 8  # of "int4" and "paroquant"


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes read plus bytes written per second of a large device copy."""
    x = jnp.ones(int(gigabytes * 2**30 / 2), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    seconds = report.timed(lambda: copy(x), repeats=20)["median_ms"] / 1e3
    return 2 * x.nbytes / seconds


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def in_format(lm, params, weights: str):
    """The parameters with the linears of all blocks in a format; random rotations for "paroquant"."""
    if weights == "bfloat16":
        return params
    rounded = jax.jit(lambda params: round_params(lm, params, "int4", group_size=GROUP_SIZE))(params)
    return rounded if weights == "int4" else rotated(rounded)


@jax.jit
def rotated(params):
    """Parameters in int4 behind random scales and rotations of their inputs."""
    leaves, rng = flatten(params), np.random.default_rng(0)
    for path, weight in leaves.items():
        if isinstance(weight, QuantizedTensor):
            layers, inputs = len(weight.codes), weight.inputs
            key = jax.random.key(len(path) + inputs)
            pairs = np.argsort(rng.random((ROTATIONS, inputs // GROUP_SIZE, GROUP_SIZE)), axis=-1)
            pairs = jnp.asarray(pairs.reshape(ROTATIONS, inputs), jnp.int16)
            leaves[path] = dataclasses.replace(
                weight,
                input_scales=jax.random.uniform(key, (layers, inputs), jnp.float16, 0.5, 2.0),
                rotation=Rotation(
                    theta=jax.random.normal(key, (layers, ROTATIONS, inputs // 2), jnp.float16),
                    pairs=jnp.tile(pairs, (layers, 1, 1)),
                ),
            )
    return unflatten(leaves)


def measure(
    lm, params, *, batch: int, length: int, block: int, steps: list[str], path: str, profile: bool, bandwidth: float
) -> Iterator[dict]:
    """One row per kind of step, as soon as it is measured."""
    config = lm.config
    capacity = length + 256
    unroll = path != "scanned"
    cache = KVCache.init(config, batch=batch, capacity=capacity, dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1))
    filled = jax.jit(
        lambda c: c.replace(
            k=jax.random.normal(keys[0], c.k.shape, c.k.dtype),
            v=jax.random.normal(keys[1], c.v.shape, c.v.dtype),
            lengths=jnp.full((batch,), length, jnp.int32),
        ),
        donate_argnums=0,
    )
    cache = filled(cache)

    def ar_step(params, cache, token):
        hidden = lm.hidden(params, token[:, None], cache=cache, unroll=unroll)
        cache = cache.append(hidden.kv)
        # The cache keeps its length, so that every repeat does the same work.
        cache = cache.replace(lengths=cache.lengths - 1)
        return cache, jnp.argmax(lm.head(params, hidden.states[:, -1]), axis=-1).astype(jnp.int32)

    def chunk(params, cache, token):
        carry = (cache, token)
        return jax.lax.scan(lambda carry, _: (ar_step(params, *carry), None), carry, None, length=CHUNK)[0]

    @jax.jit
    def denoise(params, cache, tokens):
        logits = lm.head(params, lm.hidden(params, tokens, cache=cache, own_mask=Full(), unroll=unroll).states)
        best = jnp.argmax(logits, axis=-1)
        confidence = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        return best.astype(jnp.int32), confidence

    read = bytes_of(params) - (0 if config.tied_head else params_embedding_bytes(params))
    read += 2 * config.layers * batch * length * config.kv_heads * config.head_dim * 2
    floor_ms = 1e3 * read / bandwidth
    state = {"cache": cache, "token": jnp.zeros((batch,), jnp.int32)}

    def decode(function):
        function = jax.jit(function, donate_argnums=1)

        def call():
            state["cache"], state["token"] = function(params, state["cache"], state["token"])
            return state["token"]

        return call

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, block)), jnp.int32)
    calls = {
        "ar": ("ar", decode(ar_step), 1),
        "chunk": (f"chunk {CHUNK}", decode(chunk), CHUNK),
        "block": (f"block {block}", lambda: denoise(params, state["cache"], tokens), 1),
    }
    for name, call, forwards in (calls[step] for step in steps):
        row = {"step": name, "layers": path, "batch": batch, "length": length, "floor_ms": floor_ms}
        row |= {key: value / forwards if key.endswith("_ms") else value for key, value in report.timed(call).items()}
        row["queued_ms"] = queued_ms(call) / forwards
        row["percent_of_floor_bandwidth"] = 100 * floor_ms / row["median_ms"]
        if profile:
            row["profile"] = _of_one(report.device_profile(call), forwards)
        device = f"  device {row['profile']['device_ms']:.3f} ms" if profile else ""
        print(
            f"batch {batch} length {length:6d} {name:10s} {path:8s} {row['median_ms']:8.3f} ms "
            f"[{row['min_ms']:.3f}, {row['max_ms']:.3f}]  queued {row['queued_ms']:.3f} ms  "
            f"floor {floor_ms:.3f} ms{device}",
            flush=True,
        )
        for operation in row.get("profile", {}).get("operations", []):
            print(
                f"    {100 * operation['share']:5.1f} %  {operation['ms']:8.4f} ms  {operation['launches']:5.1f} x  "
                f"idle before {operation['idle_ms']:.4f} ms  {operation['name'][:80]}"
            )
        yield row


def queued_ms(call: Callable[[], Any], *, calls: int = 20) -> float:
    """Milliseconds per call of several that follow each other without waiting for results, as engines run ahead."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start) / calls


def _of_one(profile: dict, forwards: int) -> dict:
    """The profile of one of the forwards of a call."""
    per_call = ("device_ms", "span_ms", "ms", "launches", "idle_ms")
    one = {key: value / forwards if key in per_call else value for key, value in profile.items()}
    one["operations"] = [
        {key: value / forwards if key in per_call else value for key, value in operation.items()}
        for operation in profile["operations"]
    ]
    return one


def params_embedding_bytes(params) -> int:
    """Bytes of the embedding table: a step reads a few of its rows when the head is a matrix of its own."""
    return bytes_of(params["embed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3_8b", help="classmethod of QwenConfig")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS[:3])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bfloat16"])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["bfloat16"])
    parser.add_argument(
        "--attention", nargs="+", choices=[*decode_api.IMPLEMENTATIONS], help="implementations to compare, in turn"
    )
    arguments = parser.parse_args()

    on_gpu = jax.devices()[0].platform == "gpu"
    lm = qwen.build(getattr(qwen.QwenConfig, arguments.preset)())
    bandwidth = copy_bandwidth(4.0 if on_gpu else 0.25)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    dense = jax.jit(lm.init, static_argnums=1)(jax.random.key(0), jnp.dtype(jnp.bfloat16))
    record = report.Record("decode_forward", preset=arguments.preset, copy_bytes_per_second=bandwidth)
    for form, head in itertools.product(arguments.weights, arguments.heads):
        own_lm, params = lm, in_format(lm, dense, form)
        if head != "bfloat16":
            own_lm, params = round_head(lm, params, head)
        print(f"{arguments.preset}: {bytes_of(params) / 1e9:.2f} GB of weights in {form}, head in {head}")
        for path in arguments.paths:
            forms = {"unstacked": own_lm.for_decoding, "apart": own_lm.unstack}
            weights = forms[path](params) if path in forms else params
            choices = arguments.attention or ["automatic"]
            for batch, length, choice in itertools.product(arguments.batches, arguments.lengths, choices):
                if arguments.attention:
                    decode_api.automatic = lambda *_, choice=choice, **__: (choice, "")  # models name no implementation
                for row in measure(
                    own_lm, weights, batch=batch, length=length, block=arguments.block, steps=arguments.steps,
                    path=path, profile=on_gpu, bandwidth=bandwidth,
                ):  # fmt: skip
                    record.add({"weights": form, "head": head} | row | {"attention": [choice]})


if __name__ == "__main__":
    main()

"""Every benchmark of attention, by its first argument.

    python -m benchmarks.attention --filter tiny gpt2 qwen2_5_0_5b   # named cases on any device, a CPU included
    python -m benchmarks.attention check | time | memory ...         # on a GPU: see benchmarks.attention_gpu
    python -m benchmarks.attention page                              # docs/benchmarks/attention.md from the results

Of the named cases, training ones time forward + backward of one layer, decode cases the attention of all layers of one
step. Beside wall time stands the processor time of the process (all threads), which other work on the machine disturbs
less.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import report
from pallas_kernels import decode_attention, flash_attention
from pallas_kernels.attention.cases import CASES as TRAINING
from pallas_kernels.decode_attention.cases import CASES as DECODING


def training_call(case, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (case.batch, case.num_queries, case.heads, case.head_dim)
    kv_shape = (case.batch, case.num_keys, case.kv_heads, case.head_dim)
    q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys, (shape, kv_shape, kv_shape)))

    def loss(q, k, v):
        return (flash_attention(q, k, v, mask=case.mask).astype(jnp.float32) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return lambda: gradient(q, k, v)


def decode_call(case, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    cache = (case.layers, case.batch, case.capacity, case.kv_heads, case.head_dim)
    k_cache, v_cache = (jax.random.normal(key, cache, dtype) for key in keys)
    x = jax.random.normal(keys[0], (case.batch, case.num_queries, case.heads, case.head_dim), dtype)

    @jax.jit
    def step(x, k_cache, v_cache, lengths):
        for layer in range(case.layers):
            own = x[:, :, : case.kv_heads]
            x = x + decode_attention(x, k_cache, v_cache, layer=layer, kv_lengths=lengths, own_k=own, own_v=own)
        return x

    lengths = jnp.full((case.batch,), case.live)
    return lambda: step(x, k_cache, v_cache, lengths)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["page"]:
        from benchmarks import attention_page

        return attention_page.main(argv[1:])
    if argv[:1] in (["check"], ["time"], ["memory"]):
        from benchmarks import attention_gpu  # sets JAX up for a GPU

        return attention_gpu.main(argv)
    return named_cases(argv)


def named_cases(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", nargs="*", default=[""], help="beginnings of case names")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args(argv)
    rows = []
    for kind, cases, make in (("forward + backward", TRAINING, training_call), ("decode", DECODING, decode_call)):
        for case in cases:
            if not any(case.name.startswith(beginning) for beginning in arguments.filter):
                continue
            call = make(case, jnp.dtype(arguments.dtype))
            jax.block_until_ready(call())
            processor = []

            def counted(call=call, processor=processor):
                start = time.process_time()
                result = jax.block_until_ready(call())
                processor.append(time.process_time() - start)
                return result

            wall = report.timed(counted, repeats=arguments.repeats, warm_up=1)
            row = {"case": case.name, "kind": kind, "dtype": arguments.dtype, "wall": wall}
            row["processor_min_ms"] = 1e3 * min(processor)
            rows.append(row)
            print(f"{case.name:30} {kind:20} wall {wall['median_ms']:8.2f} ms (min {wall['min_ms']:.2f}), ", end="")
            print(f"processor {row['processor_min_ms']:.2f} ms", flush=True)
    report.write("attention", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

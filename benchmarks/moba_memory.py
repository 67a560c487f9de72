"""Temporary memory of compiled block-routed and dense attention: nothing is run, so that it works on any machine.

python -m benchmarks.moba_memory
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import report
from pallas_kernels import flash_attention
from pallas_kernels.moba import moba_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 65536), ("heads", 16), ("head-dim", 128), ("block-size", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    sizes = parser.parse_args()

    def moba(q, k, v):
        return moba_attention(q, k, v, block_size=sizes.block_size, top_k=sizes.top_k, implementation="xla")

    def dense(q, k, v):
        return flash_attention(q, k, v, implementation="xla")

    heads = jax.ShapeDtypeStruct((1, sizes.length, sizes.heads, sizes.head_dim), jnp.bfloat16)
    rows = []
    for name, call in (("moba", moba), ("dense", dense)):
        gradient = jax.grad(lambda *heads, call=call: call(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        for use, function in (("forward", call), ("gradient", gradient)):
            memory = jax.jit(function).lower(heads, heads, heads).compile().memory_analysis()
            rows.append({"attention": name, "use": use, "temporary_mib": memory.temp_size_in_bytes / 2**20})
            print(rows[-1])
    report.write("moba_memory", {"sizes": vars(sizes), "rows": rows})


if __name__ == "__main__":
    main()

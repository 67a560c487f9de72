"""Memory of compiled block-routed and dense attention: nothing is run, so that it works on any machine.

    python -m benchmarks.moba_memory
    python -m benchmarks.moba_memory --gpu h200 --batch 2

The first compiles the portable paths for a CPU, the second the Hopper kernels, which needs the extra gpu-compile.
`peak` is arguments, results and temporary memory together, all that a call needs on the device.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import report
from pallas_kernels import compat, compile_gate, flash_attention
from pallas_kernels.moba import moba_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int = 1
    length: int = 65536
    heads: int = 16
    head_dim: int = 128
    block_size: int = 128
    top_k: int = 8


def compiled_memory(attention: str, use: str, sizes: Sizes, gpu: str | None = None) -> dict[str, Any]:
    """The row of "moba" or "dense" attention, "forward" or "gradient", of XLA's paths or of the kernels for `gpu`."""
    options: dict[str, Any] = {"implementation": "mosaic" if gpu else "xla"}
    call: Callable[..., Any] = flash_attention
    if attention == "moba":
        call = moba_attention
        options |= {"block_size": sizes.block_size, "top_k": sizes.top_k}
    function: Callable[..., Any] = functools.partial(call, **options)
    if use == "gradient":
        forward = function
        function = jax.grad(lambda *heads: forward(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    heads = jax.ShapeDtypeStruct(
        (sizes.batch, sizes.length, sizes.heads, sizes.head_dim),
        jnp.bfloat16,
        sharding=compile_gate.hopper_sharding(gpu) if gpu else None,
    )
    with mock.patch.object(compat, "missing_hopper", lambda: None):  # this machine need not have the GPU
        traced = jax.jit(function).trace(heads, heads, heads)
        memory = traced.lower(lowering_platforms=("cuda" if gpu else "cpu",)).compile().memory_analysis()
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    sizes_of_parts = {"temporary_mib": parts[-1] / 2**20, "peak_mib": sum(parts) / 2**20}
    return {"attention": attention, "use": use, **sizes_of_parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help=f"default {field.default}")
    parser.add_argument("--gpu", choices=compile_gate.GPUS, help="compile the kernels for this one")
    arguments = vars(parser.parse_args())
    gpu, sizes = arguments.pop("gpu"), Sizes(**arguments)
    rows = []
    for attention in ("moba", "dense"):
        for use in ("forward", "gradient"):
            rows.append(compiled_memory(attention, use, sizes, gpu))
            print(rows[-1], flush=True)
    name = f"moba_memory-compiled-for-{gpu}" if gpu else "moba_memory"
    report.write(name, {"sizes": dataclasses.asdict(sizes), "rows": rows})


if __name__ == "__main__":
    main()

"""Hopper kernels of products with four-bit weights: `decode.py` for at most 64 tokens.

The weight is `(code - zero) * scale`. Both kernels put `code - zero`, an integer of magnitude 15 at most, exactly into
bfloat16, multiply on the tensor core, and scale the float32 products of each group; activations are the only thing
that was rounded. `parts.py` is what they share.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.mosaic_sm90 import decode
from pallas_kernels.quantized_matmul.mosaic_sm90.decode import Config, heuristic_config
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import Form, form_of

__all__ = ["Config", "heuristic_config", "run", "unsupported"]


def run(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    layer: Array | int,
    *,
    group_size: int,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    form = form_of(x, codes, scales, zeros)
    config = config or heuristic_config(form)
    return decode.run(
        x, codes, scales, zeros, jnp.asarray(layer, jnp.int32), form=form, config=config, interpret=interpret
    )

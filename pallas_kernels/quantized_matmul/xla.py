"""Products in XLA: the weight is expanded on the fly, or both sides stay in their eight bits."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.quantized_matmul import rounding
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, matrix


def run(x: Array, weight: QuantizedTensor) -> Array:
    """x [M, I], already turned, to [M, O] in float32.

    bfloat16 activations meet a weight rounded to bfloat16, any others a float32 one: what float16 cannot hold does not
    overflow. A scale of all weights waits for the sums: an E2M1 code times its block's scale is exact in bfloat16.
    """
    if weight.global_scale is not None:
        return run(x, dataclasses.replace(weight, global_scale=None)) * weight.global_scale
    if weight.activations is not None:
        codes, scale = rounding.activations(x, weight.activations, weight.activation_scale)
        wide = jnp.int32 if weight.activations == "int8" else jnp.float32
        sums = jnp.einsum("mi,oi->mo", codes, weight.codes, preferred_element_type=wide).astype(jnp.float32)
        return sums * scale * weight.scales[0].astype(jnp.float32)
    operand = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("mi,oi->mo", x.astype(operand), matrix(weight, operand), preferred_element_type=jnp.float32)

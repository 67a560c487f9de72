"""The definition of `quantized_matmul`: the dense weight, and one product in float32."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.quantized_matmul import rounding
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, matrix


def run(x: Array, weight: QuantizedTensor) -> Array:
    """x [M, I], already turned, to [M, O] in float32."""
    x = x.astype(jnp.float32)
    if weight.activations is not None:
        codes, scale = rounding.activations(x, weight.activations, weight.activation_scale)
        x = codes.astype(jnp.float32) * scale
    return jnp.einsum("mi,oi->mo", x, matrix(weight), precision="highest")

"""Four-bit codes two to a byte: that of the even position in the low bits, that of the odd one in the high bits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt8

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the E2M1 floats by their lower three bits; the fourth is the sign."""


def unpack(packed: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows I"]:
    """Codes 0..15."""
    both = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: Integer[Array | np.ndarray, "*rows I"]) -> UInt8[Array | np.ndarray, "*rows half"]:
    """The lower four bits of each code: 0..15, or -8..7 in two's complement. An even number of them.

    NumPy arrays stay on the host.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"an even number of codes goes into bytes; got {codes.shape[-1]}")
    bits = (codes & 15).astype(np.uint8)
    return bits[..., ::2] | (bits[..., 1::2] << 4)


def signed(packed: UInt8[Array, "*rows half"]) -> Int[Array, "*rows I"]:
    """Codes as integers -8..7, int8."""
    both = jax.lax.bitcast_convert_type(jnp.stack([packed << 4, packed], axis=-1), jnp.int8) >> 4
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e2m1(packed: UInt8[Array, "*rows half"]) -> Array:
    """Codes as E2M1 floats, float32."""
    codes = unpack(packed).astype(jnp.int32)
    exponent, fraction = codes >> 1 & 3, codes & 1
    quarters = jnp.where(exponent == 0, 2 * fraction, (2 + fraction) << exponent)  # of the magnitude
    return jnp.where(codes & 8, -0.25, 0.25) * quarters.astype(jnp.float32)

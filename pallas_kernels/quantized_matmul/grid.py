"""The 4-bit grid of a weight and its rounding, with gradients that pass straight through."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEVELS = 15
SMALLEST, LARGEST = 1e-5, 1e5  # of a range, and of a scale that is trained


class Grid(NamedTuple):
    """Asymmetric grid per row and group: a code stands for `(code - zero) * scale`, zero = round(-offset) in 0..15."""

    scale: Float[Array, "O G"]
    offset: Float[Array, "O G"]  # smallest weight over scale, a float that can be trained


def grid_of(weight: Float[Array, "O I"], group_size: int, *, reference_range: bool = False) -> Grid:
    """The grid from the smallest to the largest weight of each row and group.

    Args:
      weight: rotated and scaled.
      group_size: channels of a group.
      reference_range: as the original has it, where a group of one sign keeps a range that does not hold 0 and its
        codes saturate; otherwise the range is made to hold 0.
    """
    groups = _groups(weight, group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if not reference_range:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = jnp.maximum(high - low, SMALLEST) / LEVELS
    return Grid(scale, low / scale)


def codes_of(weight: Float[Array, "O I"], grid: Grid) -> tuple[Int[Array, "O I"], Int[Array, "O G"]]:
    """Codes and zeros, int32 in 0..15."""
    scale, zero = _settled(grid)
    codes = _codes(_groups(weight, weight.shape[1] // scale.shape[1]), scale, zero)
    return codes.reshape(weight.shape).astype(jnp.int32), zero.astype(jnp.int32)


def quantize(weight: Float[Array, "O I"], grid: Grid) -> Float[Array, "O I"]:
    """The weight rounded to its grid. Gradients pass through rounding and clipping as if these did nothing."""
    scale, zero = _settled(grid)
    codes = _codes(_groups(weight, weight.shape[1] // scale.shape[1]), scale, zero)
    return ((codes - zero[..., None]) * scale[..., None]).reshape(weight.shape)


def _settled(grid: Grid) -> tuple[Array, Array]:
    scale = _through(grid.scale, jnp.clip(grid.scale, SMALLEST / LEVELS, LARGEST))
    return scale, _clip(-_round(grid.offset))


def _codes(groups: Array, scale: Array, zero: Array) -> Array:
    return _clip(_round(groups / scale[..., None]) + zero[..., None])


def _groups(weight: Array, group_size: int) -> Array:
    rows, channels = weight.shape
    if channels % group_size:
        raise ValueError(f"group_size must divide the {channels} channels; got {group_size}")
    return weight.reshape(rows, channels // group_size, group_size)


def _through(x: Array, value: Array) -> Array:
    """`value`, to the last bit, with the gradient of `x`."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def _round(x: Array) -> Array:
    return _through(x, jnp.round(x))


def _clip(x: Array) -> Array:
    return _through(x, jnp.clip(x, 0, LEVELS))

"""Rows of activations that are still to be normalised.

A product with a quantized weight may leave that to the kernel which scales and rotates its activations; `made` is what
they are, for everyone else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.norm_rope import rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """`rms_norm(x, weight, epsilon)`.

    Attributes:
      x: `[*rows, I]`.
      weight: `[I]`.
      epsilon: below the square root.
    """

    x: Any
    weight: Any
    epsilon: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def on_rows(self, function: Callable[[Array], Array]) -> "Normed":
        """The same of other rows."""
        return dataclasses.replace(self, x=function(self.x))

    def reshape(self, shape: tuple[int, ...]) -> "Normed":
        """As of an array; the last axis must stay."""
        if shape[-1:] != self.shape[-1:]:
            raise ValueError(f"the axis of a norm must stay {self.shape[-1]}; got {shape}")
        return self.on_rows(lambda x: x.reshape(shape))


Rows = Any  # Array | Normed


def made(rows: Rows) -> Array:
    """The rows as an array."""
    return rms_norm(rows.x, rows.weight, rows.epsilon) if isinstance(rows, Normed) else rows

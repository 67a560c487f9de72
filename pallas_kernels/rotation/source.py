"""Rows of activations that the kernel makes which turns them: norms of sums, and gated ones."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.partial import MaybePartial, made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """`rms_norm(x + y, weight, epsilon)`.

    Attributes:
      x: `[*rows, I]`.
      weight: `[I]`.
      epsilon: below the square root.
      y: an array like x, or the `Partial` of one; None: 0.
    """

    x: Any
    weight: Any
    epsilon: float = dataclasses.field(metadata={"static": True})
    y: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def flat(self) -> "Normed":
        """With one axis of rows."""
        rows = (math.prod(self.shape[:-1]), self.shape[-1])
        return dataclasses.replace(self, x=self.x.reshape(rows), y=None if self.y is None else self.y.reshape(rows))

    def total(self) -> Array:
        """`x + y`."""
        return self.x if self.y is None else self.x + made(self.y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """`silu(x) * y`.

    Attributes:
      x: the gate `[*rows, I]`, or the `Partial` of it.
      y: what is gated, the same.
    """

    x: Any
    y: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> Any:
        return self.x.dtype

    def flat(self) -> "Gated":
        """With one axis of rows."""
        rows = (math.prod(self.shape[:-1]), self.shape[-1])
        return Gated(self.x.reshape(rows), self.y.reshape(rows))

    def rows(self) -> Array:
        """What it stands for."""
        return _gated_silu(made(self.x), made(self.y))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated_silu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`silu(gate) * up`; a backward pass keeps the two operands and none of the steps between."""
    return jax.nn.silu(gate) * up


Source = Any  # Array | Normed | Gated


def operands(source: Source) -> dict[str, MaybePartial]:
    """The arrays of a source by name: x and y have rows, weight has none."""
    if not isinstance(source, Normed | Gated):
        return {"x": source}
    given = {name: getattr(source, name, None) for name in ("x", "y", "weight")}
    return {name: array for name, array in given.items() if array is not None}


def with_operands(source: Source, given: Mapping[str, MaybePartial]) -> Source:
    """A source like this one of other arrays."""
    return dataclasses.replace(source, **given) if isinstance(source, Normed | Gated) else given["x"]

"""Results that a kernel leaves in parts, for the next one to add up.

A product that splits its inputs over the machine has several partial results of each number. What reads them next may
add them in its own launch, and saves the launch that would do only that.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
    """An array that is the sum of its parts, added first to last in float32 and rounded once; `made` takes it.

    Attributes:
      parts: float32 `[J, R, columns]`, which other arrays of the same launch may share. Its rows are those of this
        array and some of which nothing is known.
      first: of the columns of this array.
      width: how many they are; the last axes of `shape`.
      shape: of the array.
      dtype: of the array.
    """

    parts: Any
    first: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def rows(self) -> int:
        """M."""
        return math.prod(self.shape) // self.width

    @property
    def own(self) -> Array:
        """What the array has of the parts, `[J, M, width]`."""
        return self.parts[:, : self.rows, self.first : self.first + self.width]

    def reshape(self, shape: tuple[int, ...]) -> "Partial":
        """As of an array; the numbers of a row must stay in one."""
        sizes = [math.prod(shape[i:]) for i in range(len(shape) + 1)]
        if math.prod(shape) != math.prod(self.shape) or self.width not in sizes:
            raise ValueError(f"cannot bring {self.shape} with rows of {self.width} into the shape {shape}")
        return dataclasses.replace(self, shape=tuple(shape))


MaybePartial = Any  # Array | Partial


def made(x: MaybePartial) -> Array:
    """The array."""
    if not isinstance(x, Partial):
        return x
    total, *others = x.own
    for part in others:
        total = total + part
    return total.astype(x.dtype).reshape(x.shape)


def unless_mapped(function: Callable[..., Any], mapped: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*arrays)`, but under `jax.vmap` what `jax.vmap(mapped)` gives: parts of many rows are no rows of parts.

    Has no derivatives: for use inside a `custom_vjp`.
    """

    @custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def over(size, is_mapped, *arrays):
        axes = jax.tree.map(lambda here: 0 if here else None, is_mapped)
        results = jax.vmap(mapped, in_axes=axes, axis_size=size)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    return call

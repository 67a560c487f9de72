"""Rows of activations that are still to be made, of a norm or a gated unit.

A product with a quantized weight may leave that to the kernel which scales, rotates and orders its activations anyway;
`made` is what they are, for everyone else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class _Source:
    """Shape and dtype of the rows, those of every operand that has rows."""

    @property
    def _rows(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter(self._rows.values())).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return next(iter(self._rows.values())).dtype

    def on_rows(self, function: Any) -> Any:
        """The same of `function` of each operand that has rows."""
        return dataclasses.replace(self, **{name: function(x) for name, x in self._rows.items()})  # type: ignore[type-var]

    def reshape(self, shape: tuple[int, ...]) -> Any:
        """As of an array; the last axis must stay."""
        if shape[-1:] != self.shape[-1:]:
            raise ValueError(f"the last axis of {type(self).__name__} rows must stay {self.shape[-1]}; got {shape}")
        return self.on_rows(lambda x: x.reshape(shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed(_Source):
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
    def _rows(self) -> dict[str, Any]:
        return {"x": self.x}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(_Source):
    """`gated_silu(gate, up)`, both `[*rows, I]`."""

    gate: Any
    up: Any

    @property
    def _rows(self) -> dict[str, Any]:
        return {"gate": self.gate, "up": self.up}


Rows = Any  # Array | Normed | Gated


def made(rows: Rows) -> Array:
    """The rows as an array."""
    if isinstance(rows, Normed):
        return rms_norm(rows.x, rows.weight, rows.epsilon)
    if isinstance(rows, Gated):
        return gated_silu(rows.gate, rows.up)
    return rows


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x²) + epsilon) * weight` over the last axis; float32 inside, dtype of `x` out."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_silu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """`silu(gate) * up`; a backward pass keeps the two operands and none of the steps between."""
    return jax.nn.silu(gate) * up

"""Activations as the codes of weights meet them: scaled, rotated, in order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.norm_rope import rms_norm
from pallas_kernels.partial import MaybePartial
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from pallas_kernels.rotation import (
    NORM_GROUP,
    Gated,
    Normed,
    Turn,
    gated_rotations,
    makes_rows,
    normed_rotations,
    pairwise_rotations,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """Activations that were made ready for several weights, in the order in which these will read them.

    Attributes:
      each: `[*rows, I]`, for each weight.
    """

    each: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.each[0].shape

    @property
    def ndim(self) -> int:
        return self.each[0].ndim

    @property
    def dtype(self) -> Any:
        return self.each[0].dtype

    def reshape(self, shape: tuple[int, ...]) -> "Turned":
        """Of each of them."""
        return Turned(tuple(x.reshape(shape) for x in self.each))


Rows = Any  # Array | Turned

MOST_NORMS = 32
"""Rows that one launch adds up, normalises and rotates. With 16 that takes 6.4 us where two launches take 8.1, with 64
it takes 20 and they 15 (README of ../rotation, 4096 channels and 3 rotations)."""


def add_norm(
    x: Float[Array, "*rows I"],
    y: MaybePartial | None,
    weight: Float[Array, " I"],
    epsilon: float,
    *,
    readers: Sequence[Any] = (),
) -> tuple[Float[Array, "*rows I"], Rows]:
    """`x + y`, and `rms_norm` of it, which the readers are to multiply.

    Where all readers are quantized weights and the kernel of rotations is the fastest way, it does all of it in one
    launch, with what the readers do to their activations; the norms are then ready for these readers and no others.

    Args:
      x: what is added to, such as a residual stream; float32, bfloat16 or float16.
      y: what is added, of the shape and dtype of x; None: nothing.
      weight: of the norm.
      epsilon: of the norm.
      readers: weights in the order in which `quantized_matmuls` will have them; others than quantized ones may be among
        them.
    """
    rows = Normed(x, weight, epsilon, y)
    if (together := _in_one_launch(rows, readers)) is not None:
        group_size, turns, places = together
        total, results = normed_rotations(rows, turns, group_size=group_size)
        if not any(reader.rotates for reader in readers):
            return total, results[0]
        return total, _turned(results, places, readers)
    total = rows.total()
    return total, rms_norm(total, weight, epsilon)


def gated_silu(gate: MaybePartial, up: MaybePartial, *, readers: Sequence[Any] = ()) -> Rows:
    """`silu(gate) * up`, which the readers are to multiply; of `[*rows, I]`.

    Where these rotate activations the kernel that does may make the rows too; as in `add_norm` they are then for these
    readers.
    """
    rows = Gated(gate, up)
    rotates = any(isinstance(reader, QuantizedTensor) and reader.rotates for reader in readers)
    if rotates and (together := _in_one_launch(rows, readers)) is not None:
        group_size, turns, places = together
        return _turned(gated_rotations(rows, turns, group_size=group_size), places, readers)
    return rows.rows()


def _turned(results: Sequence[Array], places: Sequence[int], readers: Sequence[QuantizedTensor]) -> Turned:
    return Turned(tuple(_in_order(results[place], reader) for place, reader in zip(places, readers, strict=True)))


def _in_one_launch(rows: Normed | Gated, readers: Sequence[Any]) -> tuple[int, list[Turn], list[int]] | None:
    """Size of the groups, turns, and which of these each reader has; None: not so, or it would not be faster."""
    if not readers or not all(isinstance(reader, QuantizedTensor) for reader in readers):
        return None
    if rows.dtype not in (jnp.bfloat16, jnp.float32):  # others are turned in float32
        return None
    sizes = {reader.group_size for reader in readers if reader.rotation is not None} or {NORM_GROUP}
    turns: dict[int | None, Turn] = {}
    for i, reader in enumerate(readers):  # those that change nothing share one result
        turns[i if reader.rotates else None] = reader.as_turn()
    places = [[*turns].index(i if reader.rotates else None) for i, reader in enumerate(readers)]
    (group_size, *others), every = sizes, [*turns.values()]
    if isinstance(rows, Normed) and any(turn.steps for turn in every) and math.prod(rows.shape[:-1]) > MOST_NORMS:
        return None
    if others or not makes_rows(rows, every, group_size=group_size):
        return None
    return group_size, every, places


def turn_all(x: Float[Array, "*rows I"], weights: Sequence[QuantizedTensor]) -> tuple[Float[Array, "*rows I"], ...]:
    """Activations as the codes of each weight meet them.

    bfloat16 stays bfloat16, rounded once after float32; anything else that is changed becomes float32, since scaled and
    rotated channels may outgrow float16. Rotations in groups of one size run together.
    """
    turned: dict[int, Array] = {}
    together: dict[int, list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.rotation is not None:
            together.setdefault(weight.group_size, []).append(i)
            continue
        turned[i] = x
        if (scales := weight.input_scales) is not None:
            turned[i] = (_wide(x) * weight.own(scales).astype(jnp.float32)).astype(_wide(x).dtype)
    for group_size, members in together.items():
        turns = [weights[i].as_turn() for i in members]
        turned |= zip(members, pairwise_rotations(_wide(x), turns, group_size=group_size), strict=True)
    return tuple(_in_order(turned[i], weight) for i, weight in enumerate(weights))


def _in_order(x: Array, weight: QuantizedTensor) -> Array:
    return x if weight.order is None else _wide(x)[..., weight.own(weight.order)]


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.promote_types(x.dtype, jnp.float32))

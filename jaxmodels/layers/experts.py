"""Linears of experts: each row meets the weights of the few experts that it is routed to, and none is dropped.

Letters beside the legend: R rows (tokens), C experts of each row, E experts, M = R C pairs of a row and an expert; I
inputs, O outputs of an expert's weight.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodels.functional import Axes
from jaxmodels.layers.linear import linears
from jaxmodels.sharding import constrain
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.turned import turn_all

MAX_TILE = 128
"""Rows of a tile at most; more would not read weights much more rarely."""


def route(logits: Float[Array, "R E"], top_k: int, *, normalize: bool) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """How much of which experts each row gets: the `top_k` largest of a float32 softmax, ties to the lower index.

    Args:
      logits: of the router.
      top_k: experts per row.
      normalize: the weights of a row sum to 1; else they are the softmax's over all experts.

    Returns:
      weights in the dtype of `logits`, largest first, and experts, int32.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights.astype(logits.dtype), experts


class Tiles(NamedTuple):
    """Pairs of a row and an expert, sorted by expert, in tiles that belong to one expert each.

    An expert's last tile may have free slots. How many tiles there are depends on shapes alone, so some may be free.
    """

    rows: Int[Array, "tiles size"]  # the row in each slot; R in a free one
    experts: Int[Array, " tiles"]
    slots: Int[Array, "R C"]  # of each pair, counted through all tiles

    @classmethod
    def of(cls, experts: Int[Array, "R C"], num_experts: int) -> "Tiles":
        """The tiles of some routing, about as many rows long as an expert gets: few weights are read twice.

        Up to `num_experts` pairs a tile is one row: what is read are the chosen experts' weights and no others.
        """
        rows, per_row = experts.shape
        pairs = rows * per_row
        size = min(MAX_TILE, 1 << (math.ceil(pairs / num_experts) - 1).bit_length())
        tiles = (pairs + min(pairs, num_experts) * (size - 1)) // size  # each expert may leave all slots but one free
        flat = experts.reshape(-1)
        order = jnp.argsort(flat)  # stable: pairs of an expert stay in the order of rows
        counts = jnp.zeros((num_experts,), jnp.int32).at[flat].add(1)
        own_tiles = -(-counts // size)
        last_tiles = jnp.cumsum(own_tiles)
        # The pairs of an expert begin at a new tile.
        shift = (last_tiles - own_tiles) * size - (jnp.cumsum(counts) - counts)
        slots = jnp.arange(pairs, dtype=jnp.int32) + shift[flat[order]]
        held = jnp.full((tiles * size,), rows, jnp.int32)
        held = held.at[slots].set((order // per_row).astype(jnp.int32), unique_indices=True)
        of_tile = jnp.searchsorted(last_tiles, jnp.arange(tiles), side="right")
        return cls(
            held.reshape(tiles, size),
            jnp.minimum(of_tile, num_experts - 1).astype(jnp.int32),
            jnp.zeros((pairs,), jnp.int32).at[order].set(slots, unique_indices=True).reshape(rows, per_row),
        )

    def gather(self, x: Float[Array, "R I"]) -> Float[Array, "tiles size I"]:
        """The rows in their slots; 0 in free ones."""
        return x.at[self.rows].get(mode="fill", fill_value=0)

    def combine(self, y: Float[Array, "tiles size O"], weights: Float[Array, "R C"]) -> Float[Array, "R O"]:
        """Sums of each row's results times its weights; float32 until the end."""
        own = y.reshape(-1, y.shape[-1]).at[self.slots].get(unique_indices=True, mode="promise_in_bounds")
        return jnp.einsum("RC,RCO->RO", weights, own, preferred_element_type=jnp.float32).astype(y.dtype)


def expert_linears(
    x: Float[Array, "tiles size I"],
    weights: Sequence[Float[Array, "E O I"] | QuantizedTensor],
    experts: Int[Array, " tiles"],
    *,
    axes: Axes,
) -> tuple[Float[Array, "tiles size O"], ...]:
    """`linears` of each tile with the weights of its expert, one tile after the other.

    One expert's weights are read, or expanded, at a time. `jax.lax.ragged_dot`, which says the same of dense weights,
    is expanded by XLA into products of all rows with all experts where no compiler pass knows it, as on CPUs.

    Args:
      x: rows in tiles.
      weights: of all experts, stacked; quantized ones with an axis of experts in every array, or in all but those of a
        rotation (and scales of inputs) that they share.
      experts: of each tile.
      axes: logical ones of a weight as the loop over tiles finds it. Dense weights that lie in more parts are gathered
        once before it, and not tile by tile; a backward pass keeps them as they came. Quantized ones stay as they are.
    """
    if any(isinstance(weight, QuantizedTensor) and weight.shares_turn for weight in weights):
        turned = [_turned(x, weight) for weight in weights]
        return tuple(_products(y, (w,), experts, x.dtype)[0] for y, w in zip(turned, weights, strict=True))
    if any(isinstance(weight, QuantizedTensor) for weight in weights):
        return _products(x, tuple(weights), experts, x.dtype)
    return _dense_products(axes, x, tuple(weights), experts)


def _products(x: Array, weights: tuple, experts: Array, dtype: jnp.dtype) -> tuple[Array, ...]:
    equations = ["RI,OI->RO"] * len(weights)

    def one(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        rows, expert = inputs
        return None, linears(rows, [_own(weight, expert) for weight in weights], equations, dtype=dtype)

    return jax.lax.scan(one, None, (x, experts))[1]


def _turned(x: Array, weight: Array | QuantizedTensor) -> Array:
    """Rows scaled and rotated by what all experts of a weight share."""
    if not (isinstance(weight, QuantizedTensor) and weight.shares_turn):
        return x
    (rows,) = turn_all(x.reshape(-1, x.shape[-1]), [dataclasses.replace(weight, order=None)])
    return rows.reshape(x.shape)


def _own(weight: Array | QuantizedTensor, expert: Array) -> Array | QuantizedTensor:
    if isinstance(weight, QuantizedTensor):
        return weight.of_expert(expert)
    return jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_products(axes: Axes, x: Array, weights: tuple[Array, ...], experts: Array) -> tuple[Array, ...]:
    return _products(x, tuple(constrain(weight, axes) for weight in weights), experts, x.dtype)


def _forward(axes: Axes, x: Array, weights: tuple[Array, ...], experts: Array) -> tuple[tuple[Array, ...], tuple]:
    return _dense_products(axes, x, weights, experts), (x, weights, experts)


def _backward(axes: Axes, residuals: tuple, cotangents: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], None]:
    """Adds each tile's part of a gradient in its place, in float32; a scan's own transpose would add whole arrays."""
    x, weights, experts = residuals
    weights = tuple(constrain(weight, axes) for weight in weights)

    def one(totals: tuple[Array, ...], inputs: tuple) -> tuple[tuple[Array, ...], Array]:
        rows, expert, d_outs = inputs
        d_rows = jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32))
        added = []
        for total, weight, d_out in zip(totals, weights, d_outs, strict=True):
            own = _own(weight, expert)
            d_rows += jnp.einsum("RO,OI->RI", d_out, own, preferred_element_type=d_rows.dtype)
            part = jnp.einsum("RO,RI->OI", d_out, rows, preferred_element_type=total.dtype)
            before = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
            added.append(jax.lax.dynamic_update_index_in_dim(total, before + part, expert, 0))
        return tuple(added), d_rows.astype(rows.dtype)

    zeros = tuple(jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)) for w in weights)
    totals, d_x = jax.lax.scan(one, zeros, (x, experts, cotangents))
    return d_x, tuple(total.astype(w.dtype) for total, w in zip(totals, weights, strict=True)), None


_dense_products.defvjp(_forward, _backward)

"""One key head of one row of the batch at a time, in bounded memory; cut by rows and key heads over several devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import partitioning
from pallas_kernels.moba.layout import Layout


class View(NamedTuple):
    """One key head of one row of the batch, in an array of all of them [B, L, K, ...]."""

    array: Array
    row: Int[Array, ""]
    head: Int[Array, ""]

    def pick(self) -> Array:
        """A copy, [L, ...]."""
        return jnp.squeeze(jax.lax.dynamic_slice(self.array, self._begin, self._size), (0, 2))

    def put(self, x: Array) -> Array:
        """The array of all heads with `x` [L, ...] in this place."""
        return jax.lax.dynamic_update_slice(self.array, jnp.expand_dims(x, (0, 2)), self._begin)

    @property
    def _begin(self) -> tuple[Any, ...]:
        return self.row, 0, self.head, *(0,) * (self.array.ndim - 3)

    @property
    def _size(self) -> tuple[int, ...]:
        return 1, self.array.shape[1], 1, *self.array.shape[3:]


def map_heads(
    one_head: Callable[..., tuple[Array, ...]], layout: Layout, arrays: dict[str, Array], results: dict[str, Array]
) -> tuple[Array, ...]:
    """`one_head(block_start [C], block_length [C], **views of arrays and results)` -> results [L, ...], for all heads.

    `arrays` and `results` are [B, L, K, ...], each with an L of its own. A head is given what its results hold so far
    and returns what they shall hold, in their order. They are read and written in place: no transposed copy of all
    heads is made, and none of results that nothing else reads. No derivatives.
    """

    def all_heads(start: Array, length: Array, **operands: Array) -> tuple[Array, ...]:
        num_rows, _, num_heads = operands[next(iter(results))].shape[:3]

        def visit(index, found):
            row, head = index // num_heads, index % num_heads
            arrays = operands | dict(zip(results, found, strict=True))
            views = {name: View(x, row, head) for name, x in arrays.items()}
            new = one_head(start[row], length[row], **views)
            return tuple(views[name].put(x) for name, x in zip(results, new, strict=True))

        return jax.lax.fori_loop(0, num_rows * num_heads, visit, tuple(operands[name] for name in results))

    if layout.block_start.shape[0] == 0:  # no row to slice
        return tuple(results.values())
    operands = {"start": layout.block_start, "length": layout.block_length, **arrays, **results}
    written = {f"new_{name}": x for name, x in results.items()}
    axes = {name: _axes(name, x.ndim) for name, x in (arrays | results | written).items()}
    axes |= {name: f"b {name}0" for name in ("start", "length")}
    return partitioning.cut(all_heads, operands, axes=axes, results=list(written), along="bk")


def split_groups(x: Array, k: Array) -> Array:
    """[B, T, N, ...] -> [B, T, K, G, ...], for keys [B, S, K, H]."""
    num_kv_heads = k.shape[2]
    return x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])


def join_groups(x: Array) -> Array:
    """[B, T, K, G, ...] -> [B, T, N, ...]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _axes(name: str, ndim: int) -> str:
    """In the words of `partitioning.cut`: rows and key heads, and axes that are never cut."""
    return " ".join(["b", f"{name}0", "k", *(f"{name}{axis}" for axis in range(1, ndim - 2))])

"""Kernels on a mesh of automatic axes: how XLA may cut a call that it cannot look into.

A kernel is one opaque call, so XLA's partitioner would gather its operands and run all of it on every device. `cut`
tells it that rows (batch) and key heads, with the query heads that share them, are independent: each device runs the
kernel on its own rows and heads, and every other axis is gathered first. Nothing changes on one device and inside
`shard_map`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

ROWS, KEY_HEADS, QUERY_HEADS = "b", "k", "(k g)"


def is_automatic() -> bool:
    """Whether XLA's partitioner will see what is traced now: several devices, no manual or explicit mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and (mesh.empty or set(mesh.axis_types) == {AxisType.Auto})


def cut(
    function: Callable[..., tuple[Array, ...]],
    operands: Mapping[str, Array | None],
    *,
    axes: Mapping[str, str],
    results: Sequence[str],
    group: int,
) -> tuple[Array, ...]:
    """`function(**operands)`, cut over the devices along rows and heads alone where `is_automatic()`.

    Has no derivatives: for use inside a `custom_vjp`. Under `jax.vmap` the new axis is merged with the rows.

    Args:
      function: of arrays by name, to as many arrays as `results`; all of them begin with as many rows.
      operands: arrays by name; those that are None are left out.
      axes: of each operand and result, separated by blanks: "b" rows, "k" key heads, "(k g)" query heads. Other names
        are never cut; one that stands in several places must have the same size there.
      results: names of what `function` returns.
      group: query heads per key head.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    if not is_automatic():
        return function(**given)
    read, written = ([re.findall(r"\(.*?\)|\S+", axes[name]) for name in names] for names in (given, results))

    @jax.jit  # keeps the constants of `function` to itself; a partitioned call may have none
    def call(*arrays):
        return function(**dict(zip(given, arrays, strict=True)))

    def partition(mesh, shapes, _):
        rows, heads = None, None
        for names, shape in zip(read, shapes, strict=True):
            spec = (*shape.sharding.spec, *(None,) * len(names))
            for name, size, part in zip(names, shape.shape, spec, strict=False):
                if name == ROWS:
                    rows = rows or part
                elif name in (KEY_HEADS, QUERY_HEADS):
                    key_heads = size if name == KEY_HEADS else size // group
                    heads = heads or (part if key_heads % _ways(mesh, part) == 0 else None)
        if set(_axes(rows)) & set(_axes(heads)):
            heads = None
        parts = {ROWS: rows, KEY_HEADS: heads, QUERY_HEADS: heads}

        def shardings(tensors: list[list[str]]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, PartitionSpec(*map(parts.get, names))) for names in tensors)

        return mesh, call, shardings(written), shardings(read)

    # In the order of their first appearance, as the partitioner numbers them.
    factors = dict.fromkeys(re.findall(r"\w+", " ".join(name for names in (*read, *written) for name in names)))
    divided = custom_partitioning(call)
    divided.def_partition(
        partition=partition,
        sharding_rule=" -> ".join(", ".join(" ".join(names) for names in side) for side in (read, written)),
        need_replication_factors=tuple(name for name in factors if name not in (ROWS, KEY_HEADS)),
        **({"g": group} if "g" in factors else {}),
    )
    return _rows_under_vmap(divided)(*given.values())


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _ways(mesh: Any, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _axes(part))


def over_rows(function: Callable[..., Any], x: Any, rest: Any) -> Any:
    """`function(x, rest)` with arrays `x [M, ...]` and results of M rows, which must work under `jax.vmap`.

    A mapped axis of all of `x` alone is more rows; one of anything else is one call after another. Has no derivatives.
    """

    @custom_vmap
    def call(x, rest):
        return function(x, rest)

    @call.def_vmap
    def mapped(size, is_mapped, x, rest):
        if all(jax.tree.leaves(is_mapped[0])) and not any(jax.tree.leaves(is_mapped[1])):
            results = call(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x), rest)
            results = jax.tree.map(lambda result: result.reshape(size, -1, *result.shape[1:]), results)
        else:

            def one(index):
                pick = lambda leaf, here: leaf[index] if here else leaf  # noqa: E731
                return call(*jax.tree.map(pick, (x, rest), (is_mapped[0], is_mapped[1])))

            results = jax.lax.map(one, jnp.arange(size))
        return results, jax.tree.map(lambda _: True, results)

    return call(x, rest)


def _rows_under_vmap(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """`function` of arrays whose first axes are rows; a mapped axis is merged with them."""

    @custom_vmap
    def call(*operands):
        return function(*operands)

    @call.def_vmap
    def mapped(size, is_mapped, *operands):
        spread = (
            x if here else jnp.broadcast_to(x, (size, *x.shape)) for x, here in zip(operands, is_mapped, strict=True)
        )
        results = call(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in spread))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return call

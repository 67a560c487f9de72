"""Kernels on a mesh of automatic axes: how XLA may cut a call that it cannot look into.

A kernel is one opaque call, so XLA's partitioner would gather its operands and run all of it on every device. `cut`
tells it along which axes the call falls into independent parts, such as rows and heads of attention or outputs of a
product, and along which into parts that are then added up, such as inputs of a product. Each device runs the kernel on
its own part, and every other axis is gathered first. Nothing changes on one device and inside `shard_map`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

ROWS = "b"


def is_automatic() -> bool:
    """Whether XLA's partitioner will see what is traced now: several devices, no manual or explicit mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and (mesh.empty or set(mesh.axis_types) == {AxisType.Auto})


class Summed(NamedTuple):
    """An axis whose parts give results that are added up over the devices.

    Attributes:
      axis: its name.
      function: what is called in the place of the function of `cut` where the axis is cut, with results in float32;
        their sum is rounded to the dtype of that function's.
    """

    axis: str
    function: Callable[..., tuple[Array, ...]]


def cut(
    function: Callable[..., tuple[Array, ...]],
    operands: Mapping[str, Array | None],
    *,
    axes: Mapping[str, str],
    results: Sequence[str],
    along: Sequence[str],
    units: Mapping[str, int] | None = None,
    summed: Summed | None = None,
) -> tuple[Array, ...]:
    """`function(**operands)`, cut over the devices along some of its axes where `is_automatic()`.

    An axis is cut as the first operand has it that is cut along it, in a way that is possible: the parts are equal and
    of whole units (rows apart, which may be padded), and of the mesh they use nothing that an axis which comes before
    in `along` and meets this one in an array has taken. Otherwise the operands are gathered along this axis alone.

    Has no derivatives: for use inside a `custom_vjp`. Under `jax.vmap` as `over_rows`.

    Args:
      function: of arrays by name, to as many arrays as `results`, all of which begin with rows.
      operands: arrays by name; those that are None are left out.
      axes: of each operand and result, names separated by blanks. A name that stands in several places has the same
        size there. "(k g)" is an axis of k units of g elements each, which k says how to cut.
      results: names of what `function` returns.
      along: names of the axes that may be cut; all others are gathered.
      units: the sizes of units by name, such as g.
      summed: the one of `along` that no result has; None: each has a place in some result.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    if not is_automatic():
        return function(**given)

    texts = {name: re.findall(r"\(.*?\)|\S+", axes[name]) for name in (*given, *results)}
    sizes = dict(units or {})
    for name, x in given.items():
        for text, size in zip(texts[name], x.shape, strict=True):
            axis, *unit = re.findall(r"\w+", text)
            sizes[axis] = size // math.prod(sizes[name] for name in unit)
    read, written = ([[_Axis.of(text, sizes) for text in texts[name]] for name in names] for names in (given, results))

    def by_position(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
        @jax.jit  # keeps the constants of `function` to itself; a partitioned call may have none
        def call(*arrays):
            return function(**dict(zip(given, arrays, strict=True)))

        return call

    call = by_position(function)

    def partition(mesh, shapes, result_shapes):
        lie = [
            (axis, size, part)
            for axes, shape in zip(read, shapes, strict=True)
            for axis, size, part in zip(axes, shape.shape, (*shape.sharding.spec, *(None,) * len(axes)), strict=False)
        ]
        parts: dict[str, Any] = {}
        for name in along:
            arrays = [{axis.name for axis in axes} for axes in (*read, *written)]
            taken = {way for axes in arrays if name in axes for other in axes for way in _axes(parts.get(other))}
            possible = (
                part
                for axis, size, part in lie
                if axis.name == name
                and part is not None
                and not taken & {*_axes(part)}
                and (name == ROWS or size // axis.unit % _ways(mesh, part) == 0)
            )
            parts[name] = next(possible, None)

        def shardings(tensors: list[list[_Axis]]) -> tuple[NamedSharding, ...]:
            specs = (PartitionSpec(*(parts.get(axis.name) for axis in axes)) for axes in tensors)
            return tuple(NamedSharding(mesh, spec) for spec in specs)

        on_each = call
        if summed is not None and (ways := _axes(parts[summed.axis])):
            partial = by_position(summed.function)

            def on_each(*arrays):
                sums = jax.lax.psum(partial(*arrays), ways)
                return tuple(x.astype(result.dtype) for x, result in zip(sums, result_shapes, strict=True))

        return mesh, on_each, shardings(written), shardings(read)

    every = [axis for axes in (*read, *written) for axis in axes]
    whole = {axis.name for axis in every if not axis.unit_name}  # whose sizes the partitioner sees itself
    # In the order of their first appearance, as the partitioner numbers them.
    factors = dict.fromkeys(factor for axis in every for factor in axis.factors)
    divided = custom_partitioning(call)
    divided.def_partition(
        partition=partition,
        sharding_rule=" -> ".join(", ".join(" ".join(map(str, axes)) for axes in side) for side in (read, written)),
        need_replication_factors=tuple(factor for factor in factors if factor not in along),
        **{name: sizes[name] for name in factors if name not in whole},
    )
    has_rows = {name: axes[name].split()[:1] == [ROWS] for name in given}
    return over_rows(
        lambda rows, rest: divided(*((rows | rest)[name] for name in given)),
        {name: x for name, x in given.items() if has_rows[name]},
        {name: x for name, x in given.items() if not has_rows[name]},
    )


class _Axis(NamedTuple):
    """An axis of an array, of units that stay whole."""

    name: str
    unit_name: str = ""
    unit: int = 1

    @classmethod
    def of(cls, text: str, sizes: Mapping[str, int]) -> "_Axis":
        """Of "k" or "(k g)". Units of one element, or just one unit, are none: the partitioner takes no factor of 1."""
        name, *unit = re.findall(r"\w+", text)
        if not unit or sizes[unit[0]] == 1:
            return cls(name)
        return cls(unit[0]) if sizes[name] == 1 else cls(name, unit[0], sizes[unit[0]])

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name, self.unit_name) if self.unit_name else (self.name,)

    def __str__(self) -> str:
        return f"({self.name} {self.unit_name})" if self.unit_name else self.name


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _ways(mesh: Any, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _axes(part))


def over_rows(function: Callable[..., Any], x: Any, rest: Any) -> Any:
    """`function(x, rest)` with arrays `x [M, ...]` and results of M rows, which must work under `jax.vmap`.

    A mapped axis of `x` alone is more rows; one of anything else is one call after another. Has no derivatives.
    """

    @custom_vmap
    def call(x, rest):
        return function(x, rest)

    @call.def_vmap
    def mapped(size, is_mapped, x, rest):
        if any(jax.tree.leaves(is_mapped[1])):

            def one(index):
                pick = lambda leaf, here: leaf[index] if here else leaf  # noqa: E731
                return call(*jax.tree.map(pick, (x, rest), (is_mapped[0], is_mapped[1])))

            results = jax.lax.map(one, jnp.arange(size))
        else:

            def merged(leaf, here):
                leaf = leaf if here else jnp.broadcast_to(leaf, (size, *leaf.shape))
                return leaf.reshape(size * leaf.shape[1], *leaf.shape[2:])

            results = call(jax.tree.map(merged, x, is_mapped[0]), rest)
            results = jax.tree.map(lambda result: result.reshape(size, -1, *result.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call(x, rest)
